"""Canary and shadow at run time: begins and ends a split of an alias's traffic, and records the outcomes.

`begin_split` and `end_split` are what an operator asks for. `Rollouts` is the part of one replica: it applies the
decisions of `serve.adapters.canary`, counts how both revisions do, and gives a worse canary up. Each replica judges by
its own requests; the first one that finds the canary worse ends it everywhere.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from serve.adapters.answer_diff import Comparison, compare
from serve.adapters.canary import RequestOutcome, RevisionChoice, choose_revision, error_rate, judge
from serve.adapters.publish import Control, check_holding
from serve.adapters.reconcile import ReplicaReport
from serve.catalogue.adapter_state import AdapterState, Revision
from serve.catalogue.candidate import Candidate
from serve.catalogue.catalogue import Catalogue
from serve.catalogue.entry import Audit
from serve.catalogue.split import Kind, Split, SplitPolicy
from serve.errors import PublishFailed, ReplicaUnreachable, ServeError, SplitRefused, UnknownModel
from serve.names import AdapterRevision

_MAX_OUTCOMES = 10_000
_NO_AUDIT = Audit()

logger = logging.getLogger(__name__)


async def begin_split(
    control: Control, name: str, revision: str, kind: Kind, policy: SplitPolicy, audit: Audit = _NO_AUDIT
) -> Sequence[ReplicaReport]:
    """Gives a known revision of `name` a share of its traffic, after every replica has loaded and verified it.

    Raises UnknownModel, SplitRefused if the alias points to that revision already, PublishFailed if a replica can't
    hold it (then nothing has changed), or PublishUnconfirmed.
    """
    catalogue = await asyncio.to_thread(control.log.read)
    known = _second_revision(catalogue, name, revision)
    candidate = known.candidate
    if known.staged:
        await _check_staged(control, candidate)
    else:
        await control.stage_on_all(candidate, audit, control.stage_deadline())
    split = Split(kind=kind, revision=candidate.revision, terms=policy)
    catalogue = await asyncio.to_thread(control.log.split, candidate, split, audit)
    return await control.confirm(f"{candidate.adapter} has its share", candidate, catalogue.epoch)


async def end_split(
    control: Control, name: str, kind: Kind, audit: Audit, revision: str = ""
) -> Sequence[ReplicaReport]:
    """Sends all traffic to the revision that the alias points to; running requests finish.

    Raises SplitRefused if there is no such split (of that revision), or PublishUnconfirmed.
    """
    catalogue = await asyncio.to_thread(control.log.read)
    split = catalogue.split_of(name)
    if split is None or split.kind != kind or not split.revision.startswith(revision):
        raise SplitRefused(f"{name} has no such {kind} now.")
    candidate = catalogue.candidate(AdapterRevision(name, split.revision))
    catalogue = await asyncio.to_thread(control.log.abandon, candidate, audit)
    return await control.confirm(f"The {kind} {candidate.adapter} has ended", candidate, catalogue.epoch)


async def _check_staged(control: Control, candidate: Candidate) -> None:
    """Raises PublishFailed if a replica does not hold the candidate. It was staged before, and stays staged."""
    try:
        check_holding(await control.sync(candidate, awaited=True), candidate.adapter)
    except (PublishFailed, ReplicaUnreachable) as error:
        raise PublishFailed(f"{candidate.adapter} got no share of the traffic and stays staged. {error}") from error


def _second_revision(catalogue: Catalogue, name: str, revision: str) -> Revision:
    """The revision that shall get a share. Raises UnknownModel or SplitRefused."""
    state = catalogue.adapters.get(name, AdapterState())
    if state.current is None:
        raise UnknownModel(name, {adapter.name for adapter in catalogue.current})
    second = state.find(revision)
    if second is None:
        known = ", ".join(existing.candidate.adapter.engine_name for existing in state.revisions.values())
        raise SplitRefused(f"{name} has no revision {revision!r}. It has: {known}. Stage a new one first.")
    if second == state.current:
        raise SplitRefused(
            f"{name} points to {second.candidate.adapter} already; a share of its traffic would change nothing."
        )
    return second


def _recent_outcomes() -> deque[RequestOutcome]:
    return deque(maxlen=_MAX_OUTCOMES)


@dataclass
class SplitStats:
    """The outcomes and comparisons that one replica has recorded for one split."""

    split: Split
    stable: deque[RequestOutcome] = field(default_factory=_recent_outcomes)
    canary: deque[RequestOutcome] = field(default_factory=_recent_outcomes)
    compared: int = 0  # answers of a shadow
    same: int = 0  # of those, the ones with the text that the caller got
    agreeing_words: int = 0
    words: int = 0
    dropped: int = 0  # copies that were not sent or not finished
    is_given_up: bool = False

    def add(self, adapter: AdapterRevision, outcome: RequestOutcome) -> None:
        """Records an outcome and forgets those that are older than the policy's window."""
        (self.canary if self.is_canary(adapter) else self.stable).append(outcome)
        oldest_s = outcome.at_s - self.split.terms.window_s
        for outcomes in (self.stable, self.canary):
            while outcomes and outcomes[0].at_s < oldest_s:
                outcomes.popleft()

    def is_canary(self, adapter: AdapterRevision) -> bool:
        """Whether it is the second revision, which a shadow is as well."""
        return adapter.revision == self.split.revision

    def summary(self) -> dict[str, Any]:
        return {
            "kind": self.split.kind,
            "revision": self.split.revision,
            "stable_requests": len(self.stable),
            "stable_error_rate": error_rate(self.stable),
            "canary_requests": len(self.canary),
            "canary_error_rate": error_rate(self.canary),
            "compared": self.compared,
            "same": self.same,
            "agreeing_words": self.agreeing_words,
            "words": self.words,
            "dropped": self.dropped,
        }


@dataclass
class Rollouts:
    """The splits of one replica's catalogue. `give_up(canary, reason)` ends a canary on all replicas."""

    give_up: Callable[[AdapterRevision, str], Awaitable[None]]
    _stats: dict[str, SplitStats] = field(default_factory=dict)
    _shadow_requests: int = 0
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def choose(self, catalogue: Catalogue, adapter: AdapterRevision, caller: str) -> RevisionChoice:
        """The revisions for a request of `caller` to an alias that points to `adapter`."""
        split = catalogue.split_of(adapter.name)
        if split is None:
            self._stats.pop(adapter.name, None)
            return RevisionChoice(adapter)
        if adapter.name not in self._stats or self._stats[adapter.name].split != split:
            self._stats[adapter.name] = SplitStats(split)
        if split.kind == "shadow":
            self._shadow_requests += 1
        return choose_revision(split, adapter, caller, self._shadow_requests)

    def record_outcome(self, adapter: AdapterRevision, outcome: RequestOutcome) -> None:
        """Records how a request to a revision ended. Gives the canary up if it is worse now."""
        stats = self._stats.get(adapter.name)
        if stats is None:
            return
        stats.add(adapter, outcome)
        if stats.split.kind == "canary" and stats.is_canary(adapter):
            self._judge(adapter, stats)

    def record_comparison(self, shadow: AdapterRevision, answer: str, shadow_answer: str) -> Comparison:
        """Compares the answer of a shadow with the one that the caller got."""
        comparison = compare(answer, shadow_answer)
        if stats := self._stats.get(shadow.name):
            stats.compared += 1
            stats.same += comparison.same
            stats.agreeing_words += comparison.agreeing_words
            stats.words += comparison.words
        return comparison

    def record_dropped_copy(self, shadow: AdapterRevision) -> None:
        """A copy was not sent, or not finished, because requests of callers come first."""
        if stats := self._stats.get(shadow.name):
            stats.dropped += 1

    @property
    def stats(self) -> Mapping[str, SplitStats]:
        """By adapter name."""
        return self._stats

    def summaries(self) -> dict[str, dict[str, Any]]:
        return {name: stats.summary() for name, stats in self._stats.items()}

    def _judge(self, canary: AdapterRevision, stats: SplitStats) -> None:
        reason = judge(stats.split.terms, stats.stable, stats.canary)
        if reason is None or stats.is_given_up:
            return
        stats.is_given_up = True
        logger.warning("giving up the canary %s: %s", canary, reason)
        task = asyncio.create_task(self._give_up(canary, stats, f"Given up by itself: {reason}."))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _give_up(self, canary: AdapterRevision, stats: SplitStats, reason: str) -> None:
        try:
            await self.give_up(canary, reason)
        except Exception as error:  # another replica was faster, not all replicas could be asked, or anything else
            unexpected = None if isinstance(error, ServeError) else error
            logger.warning("could not give up the canary %s: %s", canary, error, exc_info=unexpected)
            stats.is_given_up = False  # a canary that goes on is judged again
