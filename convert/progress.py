"""How far a conversion is, told to whoever wants to show it."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with what is being done, steps done and steps in all."""


def silent(what: str, done: int, total: int) -> None:
    """A Progress that tells nobody."""
