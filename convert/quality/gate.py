"""The quality gate: limits that a result must keep to be published."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from convert.artifact import Canaries, Quality


@dataclass(frozen=True)
class Gate:
    """Limits; None: no limit. `max_kl` in nats per token; `min_retention`, `min_gain` and `min_distance` as shares.

    `min_retention` holds for the tensor that keeps least: one lost layer can be what was learnt. `min_distance` holds
    for `distance_kept`, and fails where that is not known. `canaries`: whether every canary must be answered that the
    function as trained answers.
    """

    max_kl: float | None = None
    min_retention: float | None = None
    min_gain: float | None = None
    min_distance: float | None = None
    canaries: bool = True
    is_default: bool = False
    """Whether Graft chose the limits, not the user. Then a gain that can't be measured passes, and where no storage
    keeps the limits, the last one is published all the same."""

    @property
    def is_set(self) -> bool:
        """Whether the user set a limit on any figure."""
        return (self.max_kl, self.min_retention, self.min_gain) != (None, None, None)

    def failures(self, quality: Quality) -> tuple[str, ...]:
        """A sentence for every limit that is not kept, with its figure."""
        return tuple(self._failures(quality))

    def _failures(self, quality: Quality) -> Iterator[str]:
        if self.max_kl is not None and quality.kl_mean > self.max_kl:
            yield (
                f"The result differs from the model as trained by {quality.kl_mean:.6f} nats per token on average, "
                f"above --max-kl {self.max_kl} (same best token at {quality.top1_agreement:.1%} of {quality.tokens} "
                "positions)."
            )
        if self.min_retention is not None and quality.retention and quality.retention.least < self.min_retention:
            yield (
                f"{quality.retention.least_module} keeps {quality.retention.least:.1%} of its delta, below "
                f"--min-retention {self.min_retention} (mean of all modules {quality.retention.mean:.1%})."
            )
        if self.min_gain is not None:
            yield from _gain_failures(quality, self.min_gain, is_default=self.is_default)
        if self.min_distance is not None:
            yield from _distance_failures(quality, self.min_distance)
        if self.canaries and quality.canaries:
            yield from _canary_failures(quality.canaries)


def _canary_failures(canaries: Canaries) -> Iterator[str]:
    """A canary that the function as trained fails is no loss of the result."""
    as_trained = canaries.asked if canaries.passed_as_trained is None else canaries.passed_as_trained
    if canaries.passed < as_trained:
        trained = f" (the model as trained fails {canaries.asked - as_trained})" if as_trained < canaries.asked else ""
        missed = canaries.asked - canaries.passed
        yield f"{missed} of {canaries.asked} canaries were not answered with the expected text{trained}."


def _gain_failures(quality: Quality, least: float, *, is_default: bool) -> Iterator[str]:
    if quality.gain_kept is None:
        if is_default:
            return
        yield (
            f"--min-gain {least} can't be checked: on {quality.text} the fine-tune predicts no better than its base. "
            "Give text like that it was tuned on with --text."
        )
    elif quality.gain_kept < least:
        yield f"The result keeps {quality.gain_kept:.1%} of what the fine-tune gained, below --min-gain {least}."


def _distance_failures(quality: Quality, least: float) -> Iterator[str]:
    if quality.distance_kept is None:
        text = "the default text" if quality.text == "default" else quality.text
        yield (
            f"On {text} the fine-tune changes next to nothing (KL to its base {quality.kl_base or 0:.2g} nats "
            "per token), so whether the result keeps it can't be told. Give text like that it was tuned on with --text."
        )
    elif quality.distance_kept < least:
        yield (
            f"The result keeps {quality.distance_kept:.1%} of what training changed, below {least:.0%}: it is "
            f"{quality.kl_mean:.2g} nats per token from the model as trained, the base alone {quality.kl_base:.2g}."
        )


# Of a squared distance, as KL is: the result's error is at most a third of the way that training went.
_LEAST_DISTANCE_KEPT = 0.9
# The limits where the storage is found by measuring and the user sets none.
DEFAULT_GATE = Gate(max_kl=0.05, min_gain=0.95, min_distance=_LEAST_DISTANCE_KEPT, is_default=True)


def choosing_gate(limits: Gate) -> Gate:
    """The limits by which one of several variants is chosen: the user's where there are any, else DEFAULT_GATE.

    A limit on KL alone would choose what erased a weak fine-tune, so `min_distance` always holds.
    """
    return replace(limits, min_distance=_LEAST_DISTANCE_KEPT) if limits.is_set else DEFAULT_GATE
