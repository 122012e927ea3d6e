"""The state of one public name: its revisions, and the one that its alias points to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import ClassVar, Literal

from pydantic import ConfigDict

from serve.catalogue.candidate import Candidate
from serve.catalogue.split import Split
from serve.names import SHORT_REVISION

State = Literal["staged", "serving", "previous", "abandoned", "retired"]

# pydantic reads these dataclasses from snapshots, but they are no pydantic models: a model takes a kilobyte of memory,
# and every replica holds thousands of revisions.
_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True, kw_only=True)
class Revision:
    """One revision of one name, and who last changed it, when and why."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    candidate: Candidate
    state: State
    staged: bool  # replicas shall hold it; also true for a promoted revision while it is published again
    until: datetime | None = None  # end of the staging
    pinned: bool = False
    at: datetime
    by: str = ""
    reason: str = ""

    @property
    def is_promoted(self) -> bool:
        """Whether the alias points to it, or did before."""
        return self.state in ("serving", "previous")

    @property
    def is_live(self) -> bool:
        """Whether requests may ask for it: it is promoted or staged."""
        return self.is_promoted or self.staged


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterState:
    """One name with all its revisions. A snapshot holds these fields, so their names stay."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    revisions: Mapping[str, Revision] = field(default_factory=dict)  # by digest, oldest first
    line: tuple[str, ...] = ()  # digests of the revisions that led to the current one, which is the last
    entries: tuple[int, ...] = ()  # numbers of the log entries about this name
    split: Split | None = None  # the staged revision that gets a share of the traffic
    pool: str | None = None  # the pool that the alias points to instead, by its model's name

    @property
    def current(self) -> Revision | None:
        """The revision that the alias points to."""
        return self.revisions[self.line[-1]] if self.line else None

    @property
    def live_bases(self) -> frozenset[str]:
        """The fingerprints of the base models of the revisions that requests may ask for: one, or none."""
        return frozenset(revision.candidate.base for revision in self.revisions.values() if revision.is_live)

    def previous(self, count: int = 1) -> tuple[Revision, ...]:
        """The last `count` revisions that the alias pointed to before, latest first. A revision that was rolled back
        from is not among them, so a further rollback never returns to it."""
        return tuple(self.revisions[digest] for digest in reversed(self.line[:-1]))[:count]

    def find(self, prefix: str) -> Revision | None:
        """The revision whose digest begins with `prefix`; None if there is none, or the prefix is too short."""
        if len(prefix) < SHORT_REVISION:
            return None
        return next((revision for digest, revision in self.revisions.items() if digest.startswith(prefix)), None)
