"""What an image says of itself: read from the Dockerfile that builds it."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field, replace
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


def without_engine() -> dict[str, Image]:
    """The same, but a server that runs has no engine (`engineless.py`)."""
    command = ("tini", "--", "python", "/usr/local/bin/engineless.py")
    # Threads that wait for each other would take more of the processor than the work on a tiny model.
    one_thread = {"OMP_NUM_THREADS": "1"}
    return {
        name: replace(
            image,
            entrypoint=command if name.startswith("serve-") else image.entrypoint,
            environment=image.environment | one_thread,
        )
        for name, image in images().items()
    }


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
