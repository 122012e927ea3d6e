"""Every metric that Graft has, declared once: docs/metrics.md, the dashboards and the alerts are held to this list.

Names and units follow Prometheus' conventions: seconds, bytes, `_total` for what only grows. vLLM's own metrics
(`vllm:…`) pass through as they are; those of them that are declared here Graft tells itself, for inference gateways,
under the public names of adapters.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from prometheus_client.core import Metric

# No adapter can be called so (convert.artifact.Name).
BASE, OTHER, UNKNOWN = "(base)", "(other)", "(unknown)"

_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
_TOKEN_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0)
_LOAD_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

Labels = tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Spec:
    """One metric; `labels` beside `model_name`, which all of them have, and the `replica` that the exporter adds."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: Labels = ()
    buckets: tuple[float, ...] = ()


# What callers see.
REQUESTS = Spec(
    "graft_requests_total", "counter", "Requests that were answered; code 499: the caller left.",
    ("adapter", "route", "code"),
)  # fmt: skip
REQUEST_SECONDS = Spec(
    "graft_request_duration_seconds", "histogram", "From the request's arrival to the end of its answer.",
    ("adapter",), _LATENCY_S,
)  # fmt: skip
FIRST_TOKEN_SECONDS = Spec(
    "graft_time_to_first_token_seconds", "histogram",
    "From the request's arrival to the first piece of a streamed answer: queue, load and prefill included.",
    ("adapter",), _LATENCY_S,
)  # fmt: skip
TOKEN_SECONDS = Spec(
    "graft_time_per_output_token_seconds", "histogram",
    "Mean time between the tokens of a request, after the first; one observation a request.",
    ("adapter",), _TOKEN_S,
)  # fmt: skip
WAIT_SECONDS = Spec(
    "graft_queue_wait_seconds", "histogram",
    "From the request's arrival at the adapter's queue until it may run: its turn, and the load if there is one.",
    ("adapter",), _LATENCY_S,
)  # fmt: skip
PROMPT_TOKENS = Spec("graft_prompt_tokens_total", "counter", "Prompt tokens of finished requests.", ("adapter",))
CACHED_TOKENS = Spec(
    "graft_cached_prompt_tokens_total", "counter", "Those of them that the prefix cache held.", ("adapter",)
)
GENERATED_TOKENS = Spec("graft_generated_tokens_total", "counter", "Tokens of finished answers.", ("adapter",))
REJECTED = Spec(
    "graft_rejected_requests_total", "counter",
    "Requests that Graft answered with an error of its own, by the error's code (docs/errors.md).", ("reason",),
)  # fmt: skip
FORWARDED = Spec("graft_forwarded_requests_total", "counter", "Requests that a replica with their adapter answered.")
WAITING = Spec("graft_requests_waiting", "gauge", "Requests that wait for an adapter slot.", ("adapter",))
WAITING_LIMIT = Spec("graft_requests_waiting_limit", "gauge", "As many may wait; more are refused.")
IN_FLIGHT = Spec("graft_requests_in_flight", "gauge", "Requests that have arrived and are not answered yet.")

# Adapters in their tiers.
HITS = Spec(
    "graft_adapter_hits_total", "counter",
    "Requests by where their adapter was: gpu, a slot; cpu, the engine's host memory; disk, loaded for them.",
    ("adapter", "level"),
)  # fmt: skip
LOADS = Spec("graft_adapter_loads_total", "counter", "Loads into the engine; outcome: loaded, failed.",
             ("adapter", "outcome"))  # fmt: skip
LOAD_SECONDS = Spec(
    "graft_adapter_load_seconds", "histogram", "A load; phase: fetch, the files brought here; engine, into it.",
    ("phase",), _LOAD_S,
)  # fmt: skip
UNLOADS = Spec("graft_adapter_unloads_total", "counter", "Adapters that left; reason: evicted, retired, lost.",
               ("adapter", "reason"))  # fmt: skip
REGISTERED = Spec("graft_adapters_registered", "gauge", "Names that the catalogue points somewhere.")
RESIDENT = Spec("graft_adapters_resident", "gauge", "Adapters that the engine holds.")
RESIDENT_LIMIT = Spec("graft_adapters_resident_limit", "gauge", "As many may be held.")
SLOTS_USED = Spec("graft_adapter_slots_used", "gauge", "Engine slots that an adapter has.")
SLOTS = Spec("graft_adapter_slots", "gauge", "Engine slots: adapters that run at a time.")
FAILING = Spec("graft_adapters_failing", "gauge", "Revisions that could not be loaded or proven here.")

# Changes.
SWAPS = Spec(
    "graft_changes_total", "counter",
    "Changes that this replica coordinated; outcome: done, unconfirmed, or the code of the error.",
    ("verb", "outcome"),
)  # fmt: skip
PUBLISH_SECONDS = Spec(
    "graft_publish_duration_seconds", "histogram",
    "phase: stage, until every replica held and proved it; promote, until every replica answered with it.",
    ("phase",), _LATENCY_S,
)  # fmt: skip
PUBLISH_AGE = Spec("graft_publish_age_seconds", "gauge", "How long the oldest unfinished publish has been running.")
STAGED = Spec("graft_revisions_staged", "gauge", "Revisions that are staged and not promoted.")
CATALOGUE_EPOCH = Spec("graft_catalogue_epoch", "gauge", "Entries of the catalogue that this replica follows.")
CATALOGUE_AGE = Spec("graft_catalogue_age_seconds", "gauge", "Since this replica last could read the catalogue.")
FOLLOW_FAILURES = Spec("graft_catalogue_failures_total", "counter", "Looks at the catalogue that failed.")
SPLIT_SHARE = Spec("graft_split_share", "gauge", "Share of a canary or shadow.", ("adapter", "kind"))
SPLIT_ERRORS = Spec(
    "graft_split_error_ratio", "gauge", "Failed share of the requests of each side, as this replica saw them.",
    ("adapter", "side"),
)  # fmt: skip

# What must not be.
DRIFT = Spec(
    "graft_drift_repairs_total", "counter",
    "Differences between the engine and what it should hold, mended; kind: lost, stranger.", ("kind",),
)  # fmt: skip
IDENTITY_CHECKS = Spec(
    "graft_identity_checks_total", "counter", "Resident adapters that were asked again what they said when loaded."
)
IDENTITY_VIOLATIONS = Spec(
    "graft_identity_violations_total", "counter", "Those that answered as another adapter or the base would.",
    ("adapter",),
)  # fmt: skip
PROOF_FAILURES = Spec("graft_proof_failures_total", "counter", "New revisions that failed their proof here.",
                      ("adapter",))  # fmt: skip

# What is there.
ENGINE_UP = Spec("graft_engine_up", "gauge", "1 while the engine can answer.")
READY = Spec("graft_replica_ready", "gauge", "1 once the replica holds what the catalogue asks for.")
BUILD = Spec("graft_build_info", "gauge", "Always 1.", ("version", "vllm_version"))
LINEAGE = Spec(
    "graft_adapter_info", "gauge", "Always 1: what a name means now, and how it was made.",
    ("adapter", "revision", "training", "layout", "route", "source"),
)  # fmt: skip
CONVERSION_KL = Spec(
    "graft_adapter_conversion_kl_nats", "gauge", "Measured loss of the conversion, nats per token.", ("adapter",)
)
EXPIRY = Spec(
    "graft_expiry_timestamp_seconds", "gauge", "When a certificate or a key expires; kind: certificate, key.",
    ("kind", "name"),
)  # fmt: skip

# For inference gateways: what vLLM itself tells under engine names, or will tell (its pull request 54830).
GATEWAY_LORA = Spec(
    "vllm:lora_requests_info", "gauge", "Adapters in slots, and those that wait for one; the time of this answer.",
    ("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
)  # fmt: skip
GATEWAY_LOADED = Spec(
    "vllm:lora_adapter_loaded", "gauge", "1 while the adapter is resident; level: gpu, a slot; cpu, host memory.",
    ("adapter_name", "level", "pinned"),
)  # fmt: skip
GATEWAY_GPU = Spec("vllm:num_gpu_loaded_lora_adapters", "gauge", "Adapters in slots.")
GATEWAY_CPU = Spec("vllm:num_cpu_loaded_lora_adapters", "gauge", "Adapters in host memory.")
GATEWAY_SLOTS = Spec("vllm:max_gpu_lora_adapters", "gauge", "Slots.")

# Of the exporter: no `model_name`, since a replica that doesn't answer can't tell it.
REPLICA_UP = Spec("graft_replica_up", "gauge", "1 if the replica told its metrics in time.", ("replica",))
REPLICA_SCRAPE = Spec("graft_replica_scrape_seconds", "gauge", "How long it took to tell them.", ("replica",))

ALL: tuple[Spec, ...] = tuple(it for it in list(globals().values()) if isinstance(it, Spec))
OF_EXPORTER = (REPLICA_UP, REPLICA_SCRAPE)


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


class Store:
    """Counters and histograms that are counted as things happen. Plain numbers: one thread writes them."""

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

    def into(self, families: Families, first: Labels = ()) -> None:
        """Tell all of it; `first` are the values of labels that come before those that were counted with."""
        for spec, values in self._counts.items():
            for labels, value in values.items():
                families.add(spec, (*first, *labels), value)
        for spec, histograms in self._buckets.items():
            for labels, buckets in histograms.items():
                families.add_histogram(spec, (*first, *labels), buckets)


class Families:
    """Samples on their way to Prometheus, by metric."""

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
