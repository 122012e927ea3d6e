"""Benchmarks: Graft and what it is compared with, measured in one run.

`python -m benchmarks.NAME` runs one of them; `python -m benchmarks.report` writes docs/report.md from the results."""
