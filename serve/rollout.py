"""Canary and shadow: a second revision beside the one that an alias points to.

`begin` and `end` are what an operator asks for. `Rollouts` is one replica's part: who gets which revision, how both
did, and giving a canary up by itself. Each replica judges by its own requests; the first to find a canary worse ends
it everywhere.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from serve.answers import Comparison, compare
from serve.catalogue import AdapterState, Catalogue, Revision
from serve.entry import Cause
from serve.errors import PublishFailed, ReplicaUnreachable, ServeError, SplitRefused, UnknownModel
from serve.names import AdapterRevision
from serve.publish import Control, check_holding
from serve.reconcile import ReplicaReport
from serve.split import Kind, Outcome, Split, Terms, error_rate, judge

_MAX_OUTCOMES = 10_000
_NOBODY = Cause()

logger = logging.getLogger(__name__)


async def begin(
    control: Control, name: str, revision: str, kind: Kind, terms: Terms, cause: Cause = _NOBODY
) -> Sequence[ReplicaReport]:
    """Give a known revision of `name` a share of its traffic; every replica holds and proves it first.

    Raises UnknownModel, SplitRefused if it is what the alias means already, PublishFailed if a replica can't hold
    it (nothing changed then), or PublishUnconfirmed.
    """
    catalogue = await asyncio.to_thread(control.log.read)
    known = _known(catalogue, name, revision)
    candidate = known.candidate
    if known.staged:
        await _check_staged(control, candidate.adapter)
    else:
        await control.hold(candidate, cause, control.lease())
    split = Split(kind=kind, revision=candidate.revision, terms=terms)
    catalogue = await asyncio.to_thread(control.log.split, candidate, split, cause)
    return await control.confirm(f"{candidate.adapter} has its share", catalogue.epoch)


async def end(control: Control, name: str, kind: Kind, cause: Cause, revision: str = "") -> Sequence[ReplicaReport]:
    """All traffic goes to what the alias means; running requests finish. Raises SplitRefused if there is no such
    split (of that revision), or PublishUnconfirmed."""
    catalogue = await asyncio.to_thread(control.log.read)
    split = catalogue.split_of(name)
    if split is None or split.kind != kind or not split.revision.startswith(revision):
        raise SplitRefused(f"{name} has no such {kind} now.")
    candidate = catalogue.candidate(AdapterRevision(name, split.revision))
    catalogue = await asyncio.to_thread(control.log.abandon, candidate, cause)
    return await control.confirm(f"The {kind} {candidate.adapter} has ended", catalogue.epoch)


async def _check_staged(control: Control, adapter: AdapterRevision) -> None:
    """What was staged before stays staged, whether it gets its share or not."""
    try:
        check_holding(await control.replicas.sync(adapter.engine_name), adapter)
    except (PublishFailed, ReplicaUnreachable) as error:
        raise PublishFailed(f"{adapter} got no share of the traffic and stays staged. {error}") from error


def _known(catalogue: Catalogue, name: str, revision: str) -> Revision:
    state = catalogue.adapters.get(name, AdapterState())
    if state.current is None:
        raise UnknownModel(name, {adapter.name for adapter in catalogue.current})
    found = state.find(revision)
    if found is None:
        told = ", ".join(it.candidate.adapter.engine_name for it in state.revisions.values())
        raise SplitRefused(f"{name} has no revision {revision!r}. It has: {told}. Stage a new one first.")
    if found == state.current:
        raise SplitRefused(
            f"{found.candidate.adapter} is what {name} means already; a share of its traffic would change nothing."
        )
    return found


@dataclass(frozen=True)
class Choice:
    """Which revision answers a request, and which one gets a copy of it."""

    adapter: AdapterRevision
    shadow: AdapterRevision | None = None


@dataclass
class Score:
    """What one replica saw of one split since it began."""

    split: Split
    stable: deque[Outcome] = field(default_factory=lambda: deque(maxlen=_MAX_OUTCOMES))
    canary: deque[Outcome] = field(default_factory=lambda: deque(maxlen=_MAX_OUTCOMES))
    compared: int = 0
    same: int = 0
    agreeing_words: int = 0
    words: int = 0
    dropped: int = 0
    is_given_up: bool = False

    def summary(self) -> dict[str, Any]:
        counts = {"compared", "same", "agreeing_words", "words", "dropped"}
        return {
            "kind": self.split.kind,
            "revision": self.split.revision,
            **{
                f"{side}_{figure}": value
                for side, outcomes in (("stable", self.stable), ("canary", self.canary))
                for figure, value in (("requests", len(outcomes)), ("error_rate", error_rate(outcomes)))
            },
            **{name: value for name, value in asdict(self).items() if name in counts},
        }


@dataclass
class Rollouts:
    """The splits of one replica's catalogue. `give_up(canary, reason)` ends a canary everywhere."""

    give_up: Callable[[AdapterRevision, str], Awaitable[None]]
    _scores: dict[str, Score] = field(default_factory=dict)
    _shadowed: int = 0
    _ending: set[asyncio.Task[None]] = field(default_factory=set)

    def choose(self, catalogue: Catalogue, adapter: AdapterRevision, caller: str) -> Choice:
        """For a request to an alias that means `adapter`; `caller` decides for a canary."""
        split = catalogue.split_of(adapter.name)
        if split is None:
            self._scores.pop(adapter.name, None)
            return Choice(adapter)
        second = AdapterRevision(adapter.name, split.revision)
        self._score(adapter.name, split)
        if split.kind == "canary":
            return Choice(second if split.takes(caller) else adapter)
        self._shadowed += 1
        return Choice(adapter, second if split.takes(f"{caller}:{self._shadowed}") else None)

    def seen(self, adapter: AdapterRevision, outcome: Outcome) -> None:
        """A request on a revision ended; gives the canary up if it has shown to be worse."""
        score = self._scores.get(adapter.name)
        if score is None:
            return
        side = score.canary if adapter.revision == score.split.revision else score.stable
        side.append(outcome)
        for outcomes in (score.stable, score.canary):
            while outcomes and outcomes[0].at_s < outcome.at_s - score.split.terms.window_s:
                outcomes.popleft()
        if side is score.canary and score.split.kind == "canary":
            self._judge(adapter, score)

    def compared(self, shadow: AdapterRevision, told: str, said: str) -> Comparison:
        comparison = compare(told, said)
        if score := self._scores.get(shadow.name):
            score.compared += 1
            score.same += comparison.same
            score.agreeing_words += comparison.agreeing_words
            score.words += comparison.words
        return comparison

    def dropped(self, shadow: AdapterRevision) -> None:
        """A copy was not made, or not finished: users come first."""
        if score := self._scores.get(shadow.name):
            score.dropped += 1

    @property
    def scores(self) -> Mapping[str, Score]:
        """By name."""
        return self._scores

    def summaries(self) -> dict[str, dict[str, Any]]:
        return {name: score.summary() for name, score in self._scores.items()}

    def _score(self, name: str, split: Split) -> Score:
        if name not in self._scores or self._scores[name].split != split:
            self._scores[name] = Score(split)
        return self._scores[name]

    def _judge(self, canary: AdapterRevision, score: Score) -> None:
        reason = judge(score.split.terms, score.stable, score.canary)
        if reason is None or score.is_given_up:
            return
        score.is_given_up = True
        logger.warning("giving up the canary %s: %s", canary, reason)
        task = asyncio.create_task(self._end(canary, score, f"Given up by itself: {reason}."))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _end(self, canary: AdapterRevision, score: Score, reason: str) -> None:
        try:
            await self.give_up(canary, reason)
        except ServeError as error:  # another replica was faster, or not all could be asked
            logger.warning("the canary %s: %s", canary, error)
            score.is_given_up = False  # if it goes on, it is judged again
