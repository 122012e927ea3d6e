"""The routes from a checkpoint to an artifact: the table of all route variants, the rule that chooses one, and the two
routes that compute a new adapter.

Entry points: `variants.VARIANTS`, `choose.requested_variants`, `choose.choose`, `rebase.rebase`, `recover.recover`.
"""
