"""`adapters.yaml`: which adapters there shall be, and the steps from what there is to that.

adapters:
  - artifact: artifacts/pirate      # relative to this file
    name: pirate                    # default: the artifact's own
    pinned: true                    # default: false
retire_others: false                # true: what is not listed here is retired
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from convert.artifact import MANIFEST, Artifact, Name, problems_of
from convert.errors import ArtifactInvalid, ConvertError
from serve.errors import ArtifactRefused, DesiredStateInvalid, ServeError
from serve.intake import candidate_of
from serve.names import AdapterRevision
from serve.remote import AdminClient

Verb = Literal["publish", "pin", "unpin", "retire"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DesiredAdapter(_Part):
    artifact: Path
    name: Name | None = None
    pinned: bool = False


class _File(_Part):
    adapters: tuple[DesiredAdapter, ...]
    retire_others: bool = False


@dataclass(frozen=True)
class Wanted:
    """One adapter as it shall be."""

    adapter: AdapterRevision
    rank: int
    pinned: bool
    artifact: Path


@dataclass(frozen=True)
class Desired:
    """A file that has been read, with what its artifacts are right now."""

    path: Path
    wanted: tuple[Wanted, ...]
    retire_others: bool

    @classmethod
    def read(cls, path: Path) -> Desired:
        """Raises DesiredStateInvalid if the file, or an artifact it names, can't be used."""
        try:
            document = yaml.safe_load(path.read_text())
            file = _File.model_validate(document)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise DesiredStateInvalid(f"{path} can't be read: {' '.join(str(error).split())}.") from error
        except ValidationError as error:
            raise DesiredStateInvalid(
                f"{path} does not say what adapters there shall be: {problems_of(error)}."
            ) from error
        wanted = tuple(_wanted(path, it) for it in file.adapters)
        names = [it.adapter.name for it in wanted]
        if twice := sorted({it for it in names if names.count(it) > 1}):
            raise DesiredStateInvalid(f"{path} names {', '.join(twice)} more than once.")
        return cls(path, wanted, file.retire_others)

    @property
    def digest(self) -> str:
        """Of what is wanted: the same for another file that means the same."""
        lines = [
            f"{it.adapter.name} {it.adapter.revision} {it.pinned}"
            for it in sorted(self.wanted, key=lambda it: it.adapter)
        ]
        return hashlib.sha256("\n".join([*lines, str(self.retire_others)]).encode()).hexdigest()


@dataclass(frozen=True)
class Step:
    verb: Verb
    name: str
    revision: str | None = None  # digest, or how it begins
    artifact: Path | None = None

    def __str__(self) -> str:
        return f"{self.verb} {self.name}" + (f"@{self.revision[:12]}" if self.revision else "")


def diff(desired: Desired, actual: Sequence[Mapping[str, Any]]) -> tuple[Step, ...]:
    """The steps from what the admin API lists to what is desired; none if it is that already. What is new comes
    before what goes."""
    found = {it["name"]: it for it in actual}
    publish = [
        Step("publish", it.adapter.name, it.adapter.revision, it.artifact)
        for it in desired.wanted
        if found.get(it.adapter.name, {}).get("current") != it.adapter.engine_name
    ]
    pin, unpin = [], []
    for it in desired.wanted:
        pinned = found.get(it.adapter.name, {}).get("pinned", ())
        if it.pinned and it.adapter.engine_name not in pinned:
            pin.append(Step("pin", it.adapter.name, it.adapter.revision))
        unpin += [_unpin(name) for name in pinned if not (it.pinned and name == it.adapter.engine_name)]
    others = [it for it in actual if it["name"] not in {each.adapter.name for each in desired.wanted}]
    leaving = others if desired.retire_others else []
    unpin += [_unpin(name) for it in leaving for name in it["pinned"]]
    return (*publish, *pin, *unpin, *(Step("retire", it["name"]) for it in leaving))


def apply(desired: Desired, steps: Sequence[Step], client: AdminClient) -> dict[Step, ServeError | ConvertError]:
    """Take the steps in order and tell those that failed with their reasons. A failed one keeps back only those of
    its own name, so that one bad adapter blocks no other; doing it again takes what is left."""
    failed: dict[Step, ServeError | ConvertError] = {}
    for step in steps:
        if step.name in {it.name for it in failed}:
            continue
        try:
            _take(step, client, f"as desired by {desired.path.name}")
        except (ServeError, ConvertError) as error:
            failed[step] = error
    return failed


def _take(step: Step, client: AdminClient, reason: str) -> None:
    if step.verb == "publish" and step.artifact:
        client.publish(step.artifact, step.name, reason=reason)
    elif step.verb == "retire":
        client.retire(step.name, reason)
    else:
        client.change(step.verb, step.name, step.revision, reason)


def _wanted(path: Path, adapter: DesiredAdapter) -> Wanted:
    root = path.parent / adapter.artifact
    try:
        candidate = candidate_of(Artifact.open(root), adapter.name)
    except (ArtifactInvalid, ArtifactRefused) as error:
        raise DesiredStateInvalid(f"{path} names {adapter.artifact}: {error}") from error
    return Wanted(candidate.adapter, candidate.rank, adapter.pinned, root)


def _unpin(engine_name: str) -> Step:
    name, _, revision = engine_name.partition("@")
    return Step("unpin", name, revision)


def manifests(desired: Desired) -> list[Path]:
    """The files besides its own whose change changes what is desired."""
    return [it.artifact / MANIFEST for it in desired.wanted]
