"""Artifacts like those that the tests of serving make."""

from __future__ import annotations

from tests.serve.conftest import make_artifact

__all__ = ["make_artifact"]
