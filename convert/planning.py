"""The dry run: what `run` would write, and what it would take."""

from __future__ import annotations

from dataclasses import dataclass

from convert.errors import ConvertError
from convert.estimate import Estimate, estimate
from convert.preparation import Candidate, Job, Request, prepare
from convert.progress import Progress
from convert.quality import Tokenizer, token_rows

# The function as trained, the base alone, and the result.
_PASSES = 3


@dataclass(frozen=True)
class Planned:
    """One way that `run` would try. `obstacle`: why it would be passed over."""

    flags: str
    candidate: Candidate | None
    estimate: Estimate | None
    obstacle: str | None


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the first byte."""

    job: Job
    ways: tuple[Planned, ...]


def planned(request: Request, progress: Progress) -> Plan:
    """The ways that `run` would try, in its order. Raises ConvertError where it would not begin."""
    job = prepare(request, progress)
    tokenizer = job.checkpoint.root if job.checkpoint.tokenizer_files else job.base.root
    tokens = sum(map(len, token_rows(job.text, Tokenizer.open(tokenizer))))
    found: list[Planned] = []
    last: ConvertError | None = None
    for way in job.open_ways():
        try:
            candidate = job.candidate(way)
        except ConvertError as error:
            found.append(Planned(way.flags, None, None, str(error)))
            last = error
            continue
        costs = estimate(candidate.plan, job.base, job.checkpoint, tokens, _PASSES)
        found.append(Planned(way.flags, candidate, costs, None))
    if last and all(it.candidate is None for it in found):
        raise last
    return Plan(job, tuple(found))
