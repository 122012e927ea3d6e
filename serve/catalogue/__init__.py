"""The durable truth of a server: which adapter revisions exist, which of them each alias points to, and their files.

`state_dir.StateDir` opens it: `log.CatalogueLog` appends to the log and reads it as a `catalogue.Catalogue`, and
`adapter_store.AdapterStore` holds the files.
"""
