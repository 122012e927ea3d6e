"""Copies of a library's modules with one name changed: a contract must notice each of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tests.contracts.contract import Contract, Library

_MARKERS = ("/", "*", "**")


def names_of(contract: Contract) -> Iterator[tuple[str, str, str]]:
    """Of every entry: itself, the module that defines what it names, and one name that the contract holds on to."""
    for entry, parts in contract.items():
        module, _, qualified = entry.partition(":")
        if qualified and " " not in qualified:
            yield entry, module, qualified.rpartition(".")[2]
        yield from ((entry, module, part) for part in parts if part not in _MARKERS)


def with_renamed(library: Library, directory: Path, module: str, name: str) -> None:
    """Write the module to `directory`, an overlay for Library, with `name` renamed wherever it stands."""
    source = library.file_of(module)
    assert source is not None, module
    copy = directory / Path(*module.split(".")).with_suffix(".py")
    if source.stem == "__init__":
        copy = directory / Path(*module.split("."), "__init__.py")
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(re.sub(rf"\b{re.escape(name)}\b", f"renamed_{name.strip('_')}", source.read_text(encoding="utf-8")))
