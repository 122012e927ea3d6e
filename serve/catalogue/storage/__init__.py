"""Where the catalogue and the adapters are kept: a directory or an object store, and copies on this machine."""
