"""Servers that a test starts for itself, and how they end."""
