"""The limits a result must keep to be published."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from convert.artifact import Quality
from convert.errors import QualityGateFailed


@dataclass(frozen=True)
class Gate:
    """None: no limit. `min_retention` is for the tensor that keeps least: one lost layer can be what was learnt."""

    max_kl: float | None = None
    min_retention: float | None = None
    min_gain: float | None = None
    canaries: bool = True
    lenient: bool = False
    """Whether a gain that can't be measured passes: for limits that the user didn't set."""

    @property
    def is_set(self) -> bool:
        """Whether any number is limited."""
        return (self.max_kl, self.min_retention, self.min_gain) != (None, None, None)

    def failures(self, quality: Quality) -> tuple[str, ...]:
        """A sentence for every limit that is not kept, with its figure."""
        return tuple(self._failures(quality))

    def require(self, quality: Quality) -> None:
        """Raises QualityGateFailed with all failures."""
        failures = self.failures(quality)
        if not failures:
            return
        told = failures[0] if len(failures) == 1 else "".join(f"\n  - {failure}" for failure in failures) + "\n"
        raise QualityGateFailed(
            f"{told} Nothing was published. Take a route that loses less (inspect lists them), or allow more."
        )

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
            yield from _gain_failures(quality, self.min_gain, lenient=self.lenient)
        if self.canaries and quality.canaries and quality.canaries.passed < quality.canaries.asked:
            missed = quality.canaries.asked - quality.canaries.passed
            yield f"{missed} of {quality.canaries.asked} canaries were not answered with the expected text."


def _gain_failures(quality: Quality, least: float, *, lenient: bool) -> Iterator[str]:
    if quality.gain_kept is None:
        if lenient:
            return
        yield (
            f"--min-gain {least} can't be checked: on {quality.text} the fine-tune predicts no better than its base. "
            "Give text like that it was tuned on with --text."
        )
    elif quality.gain_kept < least:
        yield f"The result keeps {quality.gain_kept:.1%} of what the fine-tune gained, below --min-gain {least}."
