"""What is broken on purpose, and what callers saw of it."""
