"""`plan`: computes what `run` would write, and the memory and time that it would need."""

from __future__ import annotations

from dataclasses import dataclass

from convert.errors import ConvertError
from convert.pipeline.request import Candidate, PreparedRequest, Request, prepare
from convert.plan.estimate import Estimate, estimate
from convert.progress import Progress
from convert.quality import MAX_TOKENS, measuring_bytes, token_rows
from convert.routes.variants import RouteVariant

# The function as trained, the base alone, and the result.
_PASSES = 3
# The first two go through a layer together.
_READINGS = 2


@dataclass(frozen=True)
class PlannedVariant:
    """A variant that `run` would try.

    `obstacle`: why the variant would be passed over; then `candidate` and `estimate` are None.
    """

    variant: RouteVariant
    candidate: Candidate | None
    estimate: Estimate | None
    obstacle: str | None


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
    tokens = min(sum(map(len, token_rows(prepared.text, prepared.tokenizer))), MAX_TOKENS)
    memory = measuring_bytes(prepared.base, prepared.checkpoint, tokens)
    for variant in open_variants:
        try:
            candidate = prepared.candidate(variant)
        except ConvertError as error:
            variants.append(PlannedVariant(variant, None, None, str(error)))
            last = error
            continue
        costs = estimate(candidate.plan, prepared.base, prepared.checkpoint, memory, tokens, _PASSES, _READINGS)
        variants.append(PlannedVariant(variant, candidate, costs, None))
    if last and all(planned.candidate is None for planned in variants):
        raise last
    return DryRun(prepared, tuple(variants))
