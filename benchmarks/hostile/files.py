"""Damaged copies of files, for the functions that must reject them."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**70, 1e308, "", "../../etc/passwd", "/etc/passwd", "\x00", [], {}, [[]], {"": None}),
    *("x" * 10_000, ["a"] * 100, "00" * 32, "!!python/object/apply:os.system ['id']", "__import__('os')"),
)


@dataclass(frozen=True)
class Surface:
    """A file format: a directory with a valid file of it, and the function that reads such a directory."""

    name: str
    directory: Path  # valid
    file: str
    read: Callable[[Path], object]
    must_refuse: Callable[[bytes], bool] = lambda content: False  # whether this content must be refused


def damaged(content: bytes, count: int, seed: int) -> Iterator[bytes]:
    """`count` damaged versions of `content`: flipped bits, bytes removed, repeated or inserted, and for JSON values of
    other types. The same `seed` gives the same versions."""
    rng = random.Random(seed)  # noqa: S311  (repeatable, no secret)
    try:
        document = json.loads(content)
    except ValueError:
        document = None
    for number in range(count):
        if document is not None and number % 2:
            yield json.dumps(_damage_json(document, rng)).encode()
        else:
            yield _damage_bytes(content, rng)


def _damage_bytes(content: bytes, rng: random.Random) -> bytes:
    head = min(len(content), 4096)  # mostly damage headers and names, which parsers interpret
    at = rng.randrange(head if rng.random() < 0.8 else len(content)) if content else 0
    match rng.randrange(5):
        case 0:
            return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
        case 1:
            return content[:at]
        case 2:
            return content[:at] + rng.randbytes(rng.randrange(1, 64)) + content[at:]
        case 3:
            return content[:at] + content[at + rng.randrange(1, 64) :]
        case _:
            return content[:at] + content[at : at + 200] * rng.choice((2, 50)) + content[at:]


def _damage_json(document: Any, rng: random.Random) -> Any:
    """A copy in which one value at a random location is replaced or removed."""
    copy = json.loads(json.dumps(document))
    locations = list(_locations(copy))
    if not locations:
        return rng.choice(_VALUES)
    holder, key = rng.choice(locations)
    if rng.random() < 0.2:
        del holder[key]
    else:
        holder[key] = rng.choice(_VALUES)
    return copy


def _locations(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _locations(value[key])


def variants(surface: Surface, count: int, work: Path) -> Iterator[Path]:
    """Directories with a damaged file; each is removed when the next is requested."""
    content = (surface.directory / surface.file).read_bytes()
    for number, bad in enumerate(damaged(content, count, seed=20)):
        copy = work / f"{re.sub('[ /]', '-', surface.name)}-{number}"
        shutil.copytree(surface.directory, copy)
        (copy / surface.file).write_bytes(bad)
        yield copy
        shutil.rmtree(copy)
