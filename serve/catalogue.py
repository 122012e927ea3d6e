"""The durable truth of which adapters exist: an append-only log of small entries.

    DIR/0000000001.json, 0000000002.json, …

An entry is written whole under another name and then linked to its number, which fails if the number is
taken: two writers can't both win, and no reader sees half an entry. Folding the entries in order gives the
`Catalogue`; the number of the last one is its epoch. History comes for free.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serve.candidate import Candidate
from serve.errors import PublishFailed, StateInvalid, UnknownModel
from serve.names import SHORT_REVISION, AdapterRevision, RequestedModel
from serve.split import Split

Verb = Literal["stage", "promote", "abandon", "retire", "split"]


class Entry(BaseModel):
    """One line of history."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    verb: Verb = Field(
        description="stage: replicas shall hold it. promote: the alias points to it. "
        "abandon: a staged revision is given up. retire: the alias goes away. "
        "split: the staged revision gets a share of the alias's traffic, until it is promoted or abandoned."
    )
    candidate: Candidate
    at: datetime
    reason: str = ""
    split: Split | None = Field(None, description="With the verb `split` only.")


@dataclass(frozen=True)
class AdapterState:
    """One name: where its alias points, what is staged, every revision promoted since it was last retired, and
    the staged revision that gets a share of its traffic."""

    current: AdapterRevision | None = None
    staged: frozenset[AdapterRevision] = frozenset()
    promoted: tuple[AdapterRevision, ...] = ()
    split: Split | None = None


@dataclass(frozen=True)
class Catalogue:
    """The state after `epoch` entries. A value: following the log makes a new one."""

    epoch: int = 0
    adapters: Mapping[str, AdapterState] = field(default_factory=dict)
    candidates: Mapping[AdapterRevision, Candidate] = field(default_factory=dict)

    @property
    def current(self) -> frozenset[AdapterRevision]:
        return frozenset(state.current for state in self.adapters.values() if state.current)

    @property
    def staged(self) -> frozenset[AdapterRevision]:
        return frozenset().union(*(state.staged for state in self.adapters.values()))

    @property
    def wanted(self) -> tuple[Candidate, ...]:
        """What a server of this catalogue must be able to hold."""
        return tuple(self.candidates[adapter] for adapter in sorted(self.current | self.staged))

    def resolve(self, requested: RequestedModel) -> AdapterRevision | None:
        """The revision an alias points to, or the one it is pinned to; None if there is no such adapter."""
        state = self.adapters.get(requested.name)
        if state is None or requested.revision is None:
            return state.current if state else None
        if len(requested.revision) < SHORT_REVISION:
            return None
        reachable = (*state.promoted, *state.staged)
        return next((it for it in reachable if it.revision.startswith(requested.revision)), None)

    def split_of(self, name: str) -> Split | None:
        return self.adapters.get(name, AdapterState()).split

    def was_promoted(self, adapter: AdapterRevision) -> bool:
        return adapter in self.adapters.get(adapter.name, AdapterState()).promoted

    def after(self, entry: Entry) -> Catalogue:
        """The state when `entry` follows."""
        adapter = entry.candidate.adapter
        state = _FOLD[entry.verb](self.adapters.get(adapter.name, AdapterState()), adapter)
        if entry.split:
            state = _with_split(state, entry.split)
        return Catalogue(
            self.epoch + 1,
            dict(self.adapters) | {adapter.name: state},
            dict(self.candidates) | {adapter: entry.candidate},
        )


def _stage(state: AdapterState, adapter: AdapterRevision) -> AdapterState:
    return replace(state, staged=state.staged | {adapter})


def _promote(state: AdapterState, adapter: AdapterRevision) -> AdapterState:
    promoted = state.promoted if adapter in state.promoted else (*state.promoted, adapter)
    state = _without_split(state)  # what it was compared with is not there any more
    return replace(state, current=adapter, staged=state.staged - {adapter}, promoted=promoted)


def _abandon(state: AdapterState, adapter: AdapterRevision) -> AdapterState:
    if state.split and state.split.revision == adapter.revision:
        state = _without_split(state)
    return replace(state, staged=state.staged - {adapter})


def _retire(_: AdapterState, __: AdapterRevision) -> AdapterState:
    return AdapterState()  # pinned requests end as well


def _split(state: AdapterState, _: AdapterRevision) -> AdapterState:
    return state  # the entry says which


def _with_split(state: AdapterState, split: Split) -> AdapterState:
    if state.split and state.split.revision != split.revision:
        state = _without_split(state)
    return replace(state, split=split)


def _without_split(state: AdapterState) -> AdapterState:
    """The split ends, and the revision that had a share isn't held for it any longer."""
    if state.split is None:
        return state
    held = frozenset(adapter for adapter in state.staged if adapter.revision != state.split.revision)
    return replace(state, staged=held, split=None)


_FOLD: dict[str, Callable[[AdapterState, AdapterRevision], AdapterState]] = {
    "stage": _stage,
    "promote": _promote,
    "abandon": _abandon,
    "retire": _retire,
    "split": _split,
}


class CatalogueLog:
    """The log in a directory that every replica and every writer can reach."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def follow(self, catalogue: Catalogue) -> Catalogue:
        """`catalogue` with every entry that came since; one failed open when there is none."""
        while (entry := self._read(catalogue.epoch + 1)) is not None:
            catalogue = catalogue.after(entry)
        return catalogue

    def read(self) -> Catalogue:
        return self.follow(Catalogue())

    def append(self, decide: Callable[[Catalogue], Entry | None]) -> Catalogue:
        """Add the entry that `decide` derives from the state before it; asked anew if another writer was
        faster. None adds nothing. Durable when it returns."""
        catalogue = self.read()
        while (entry := decide(catalogue)) is not None:
            if self._create(catalogue.epoch + 1, entry):
                return catalogue.after(entry)
            catalogue = self.follow(catalogue)
        return catalogue

    def stage(self, candidate: Candidate) -> Catalogue:
        return self.append(lambda _: _entry("stage", candidate))

    def promote(self, candidate: Candidate) -> Catalogue:
        """Point the alias to a staged revision. Raises PublishFailed if it is not, or no longer, staged."""

        adapter = candidate.adapter

        def decide(catalogue: Catalogue) -> Entry:
            if adapter not in catalogue.staged:
                raise PublishFailed(f"{adapter} is not staged any more: another publish or a retire was faster.")
            return _entry("promote", candidate)

        return self.append(decide)

    def abandon(self, candidate: Candidate, reason: str) -> Catalogue:
        return self.append(lambda _: _entry("abandon", candidate, reason))

    def split(self, candidate: Candidate, split: Split) -> Catalogue:
        """Give a staged revision a share. Raises PublishFailed if it is not, or no longer, staged."""
        adapter = candidate.adapter

        def decide(catalogue: Catalogue) -> Entry:
            if adapter not in catalogue.staged:
                raise PublishFailed(f"{adapter} is not staged any more: a publish or a retire was faster.")
            return Entry(verb="split", candidate=candidate, at=datetime.now(UTC), split=split)

        return self.append(decide)

    def retire(self, name: str) -> Catalogue:
        """Take the alias away. Raises UnknownModel if there is none."""

        def decide(catalogue: Catalogue) -> Entry:
            current = catalogue.resolve(RequestedModel(name))
            if current is None:
                raise UnknownModel(name, {adapter.name for adapter in catalogue.current})
            return _entry("retire", catalogue.candidates[current])

        return self.append(decide)

    def _path(self, number: int) -> Path:
        return self._directory / f"{number:010}.json"

    def _read(self, number: int) -> Entry | None:
        path = self._path(number)
        try:
            return Entry.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            raise StateInvalid(
                f"The catalogue entry {path} can't be read: {error}. "
                "Restore it from a backup, or start with a new --state directory and publish again."
            ) from error

    def _create(self, number: int, entry: Entry) -> bool:
        self._directory.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=self._directory, prefix=".entry-")
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(entry.model_dump_json().encode())
                stream.flush()
                os.fsync(stream.fileno())
            try:
                os.link(temporary, self._path(number))
            except FileExistsError:
                return False
            _fsync_directory(self._directory)
            return True
        finally:
            with contextlib.suppress(FileNotFoundError):
                Path(temporary).unlink()


def _entry(verb: Verb, candidate: Candidate, reason: str = "") -> Entry:
    return Entry(verb=verb, candidate=candidate, at=datetime.now(UTC), reason=reason)


def _fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
