"""The verbs of `python -m convert`, one module each, and the steps that they share: read the request, build a
candidate, evaluate it, write the manifest.

Entry points: `convert.convert`, `inspect.inspect`, `dry_run.dry_run`, `compare.compare`.
"""
