"""What an image says of itself: read from the Dockerfile that builds it."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from functools import cache

from tests.deploy.manifests import ROOT


@dataclass(frozen=True)
class Image:
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    directory: str = "/"
    user: str = "0:0"
    environment: dict[str, str] = field(default_factory=dict)


@cache
def images() -> dict[str, Image]:
    """Every stage of the Dockerfile by its name."""
    stages: dict[str, Image] = {}
    name, current = "", Image()
    for line in _instructions():
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            parent, _, name = rest.partition(" AS ")
            current = stages.get(parent, Image())
        stages[name] = current = _after(current, instruction, rest)
    return stages


def _instructions() -> list[str]:
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    return re.sub(r"\\\n\s*", "", text).splitlines()


def _after(image: Image, instruction: str, rest: str) -> Image:
    changes: dict[str, object] = {}
    match instruction:
        case "ENTRYPOINT":
            changes = {"entrypoint": tuple(json.loads(rest)), "command": ()}
        case "CMD":
            changes = {"command": tuple(json.loads(rest))}
        case "WORKDIR":
            changes = {"directory": rest}
        case "USER":
            changes = {"user": rest}
        case "ENV":
            pairs = dict(part.partition("=")[::2] for part in shlex.split(rest))
            changes = {"environment": image.environment | pairs}
    return Image(**{**image.__dict__, **changes})  # type: ignore[arg-type]
