"""Fault injection: a deployment on this machine, faults, and what callers observe of them.

`python -m benchmarks.faults` is the entry point."""
