"""Invalid requests and damaged files against a real server and every reader of files.

`python -m benchmarks.hostile` is the entry point."""
