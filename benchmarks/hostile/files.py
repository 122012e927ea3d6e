"""Files that were damaged or made to hurt, and the readers that must say no."""

from __future__ import annotations

import json
import random
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
    """A file, and what reads it in a directory that holds it."""

    name: str
    directory: Path  # as it should be
    file: str
    read: Callable[[Path], object]


def damaged(content: bytes, count: int, seed: int) -> Iterator[bytes]:
    """`count` of them: bits that turned over, pieces that are missing, doubled or of something else, and, where it is
    JSON, values that don't belong."""
    chance = random.Random(seed)  # noqa: S311  (the same ones every time)
    try:
        document = json.loads(content)
    except ValueError:
        document = None
    for number in range(count):
        if document is not None and number % 2:
            yield json.dumps(_with_another_value(document, chance)).encode()
        else:
            yield _with_other_bytes(content, chance)


def _with_other_bytes(content: bytes, chance: random.Random) -> bytes:
    head = min(len(content), 4096)  # headers and names, where there is more to get wrong
    at = chance.randrange(head if chance.random() < 0.8 else len(content)) if content else 0
    match chance.randrange(5):
        case 0:
            return content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :]
        case 1:
            return content[:at]
        case 2:
            return content[:at] + chance.randbytes(chance.randrange(1, 64)) + content[at:]
        case 3:
            return content[:at] + content[at + chance.randrange(1, 64) :]
        case _:
            return content[:at] + content[at : at + 200] * chance.choice((2, 50)) + content[at:]


def _with_another_value(document: Any, chance: random.Random) -> Any:
    """A copy in which one value, somewhere, is another one, or gone."""
    copy = json.loads(json.dumps(document))
    places = list(_places(copy))
    if not places:
        return chance.choice(_VALUES)
    holder, key = chance.choice(places)
    if chance.random() < 0.2:
        del holder[key]
    else:
        holder[key] = chance.choice(_VALUES)
    return copy


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def variants(surface: Surface, count: int, work: Path) -> Iterator[Path]:
    """A directory each, of which the file is damaged; gone when the next one is asked for."""
    content = (surface.directory / surface.file).read_bytes()
    for number, bad in enumerate(damaged(content, count, seed=20)):
        copy = work / f"{surface.name.replace(' ', '-')}-{number}"
        shutil.copytree(surface.directory, copy)
        (copy / surface.file).write_bytes(bad)
        yield copy
        shutil.rmtree(copy)
