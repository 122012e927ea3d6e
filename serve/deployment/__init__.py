"""Runs engines as a Ray Serve deployment: on this machine with a private Ray, or on a cluster of others.

Entry points: `local.local_server`, and `app.build`, the application builder that Ray Serve imports by name.
"""
