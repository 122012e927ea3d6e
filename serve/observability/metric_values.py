"""The values of metrics: counted when something happens, and grouped for one scrape."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client.core import Metric

from serve.observability.metrics import Labels, Spec


class Buckets:
    """The counts of one histogram."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def samples(self) -> Iterator[tuple[str, dict[str, str], float]]:
        """Suffix, further labels, value."""
        total = 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            yield "_bucket", {"le": bound}, total
        yield "_count", {}, total
        yield "_sum", {}, self._sum


class MetricValues:
    """Counters and histograms that are counted when something happens. Plain numbers: only one thread writes them."""

    def __init__(self) -> None:
        self._counts: dict[Spec, dict[Labels, float]] = {}
        self._buckets: dict[Spec, dict[Labels, Buckets]] = {}

    def add(self, spec: Spec, labels: Labels = (), by: float = 1) -> None:
        values = self._counts.setdefault(spec, {})
        values[labels] = values.get(labels, 0) + by

    def observe(self, spec: Spec, value: float, labels: Labels = ()) -> None:
        histograms = self._buckets.setdefault(spec, {})
        if labels not in histograms:
            histograms[labels] = Buckets(spec.buckets)
        histograms[labels].observe(value)

    def add_to(self, families: MetricFamilies, first: Labels = ()) -> None:
        """Add all values. `first`: values of the labels that precede those that the values were counted with."""
        for spec, values in self._counts.items():
            for labels, value in values.items():
                families.add(spec, (*first, *labels), value)
        for spec, histograms in self._buckets.items():
            for labels, buckets in histograms.items():
                families.add_histogram(spec, (*first, *labels), buckets)


class MetricFamilies:
    """Samples of one scrape, grouped by metric."""

    def __init__(self, constant: Mapping[str, str]) -> None:
        """`constant`: labels of every sample."""
        self._constant = dict(constant)
        self._families: dict[Spec, Metric] = {}

    def add(self, spec: Spec, labels: Labels, value: float) -> None:
        self._of(spec).add_sample(spec.name, self._labels(spec, labels), value)

    def add_histogram(self, spec: Spec, labels: Labels, buckets: Buckets) -> None:
        family, common = self._of(spec), self._labels(spec, labels)
        for suffix, further, value in buckets.samples():
            family.add_sample(spec.name + suffix, common | further, value)

    def gauges(self, values: Mapping[Spec, float]) -> None:
        for spec, value in values.items():
            self.add(spec, (), value)

    def __iter__(self) -> Iterator[Metric]:
        return iter(self._families.values())

    def _of(self, spec: Spec) -> Metric:
        if spec not in self._families:
            self._families[spec] = Metric(spec.name.removesuffix("_total"), spec.help, spec.kind)
        return self._families[spec]

    def _labels(self, spec: Spec, values: Iterable[str]) -> dict[str, str]:
        return self._constant | dict(zip(spec.labels, values, strict=True))
