"""Writes an artifact: weights as a stream, small files durably, and all of it published by one rename.

Entry points: `publisher.ArtifactWriter`, `model.write_model` and `adapter.write_adapter`.
"""
