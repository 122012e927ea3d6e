"""`plan`: computes what `run` would write, and the memory and time that it would need."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from convert.errors import ConvertError
from convert.pipeline.estimate import Estimator
from convert.pipeline.request import Candidate, PreparedRequest, Request, prepare
from convert.plan.machine import shortages
from convert.plan.phases import Estimate
from convert.progress import Progress
from convert.routes.variants import RouteVariant


@dataclass(frozen=True)
class PlannedVariant:
    """A variant that `run` would try.

    `obstacle`: why the variant would be passed over; then `candidate` and `estimate` are None. `shortages`: why `run`
    would refuse it on this machine, with its artifact in the current directory.
    """

    variant: RouteVariant
    candidate: Candidate | None
    estimate: Estimate | None
    obstacle: str | None
    shortages: tuple[str, ...] = ()


@dataclass(frozen=True)
class DryRun:
    """Everything that is known before the first byte is written."""

    prepared: PreparedRequest
    variants: tuple[PlannedVariant, ...]


def dry_run(request: Request, progress: Progress) -> DryRun:
    """The variants that `run` would try, in its order. Raises ConvertError where `run` would not begin."""
    prepared = prepare(request, progress)
    variants: list[PlannedVariant] = []
    last: ConvertError | None = None
    open_variants = prepared.open_variants()
    estimator = Estimator.of(prepared)
    for variant in open_variants:
        try:
            candidate = prepared.candidate(variant)
        except ConvertError as error:
            variants.append(PlannedVariant(variant, None, None, str(error)))
            last = error
            continue
        costs = estimator.timed(candidate)
        variants.append(PlannedVariant(variant, candidate, costs, None, shortages(costs, Path("out"))))
    if last and all(planned.candidate is None for planned in variants):
        raise last
    return DryRun(prepared, tuple(variants))
