"""The commands of `python -m serve`: a module for each group of commands, and what they share: options and tables.

Entry points: `add_to(app)` of every module with commands, which `app.app` calls.
"""
