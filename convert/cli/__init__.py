"""The command line: one module for each command, and what the commands share: options, console, progress, report.

Entry point: `add_to(app)` of every command's module, which `app` calls.
"""
