"""The callback by which long work reports its progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with the name of the step, the parts of it that are done, and all parts of it."""


def silent(step: str, done: int, total: int) -> None:
    """A Progress that shows nothing."""
