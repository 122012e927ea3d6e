"""Every metric that Graft has, declared once: tests compare docs/reference/metrics.md, dashboards and alerts with it.

Names and units follow Prometheus' conventions: seconds, bytes, `_total` for counters. vLLM's own metrics (`vllm:…`) are
exported unchanged. Those of them that are declared here are Graft's own values, for inference gateways, under the
public names of adapters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# No adapter can have these names (convert.artifact.Name).
BASE, OTHER, UNKNOWN = "(base)", "(other)", "(unknown)"

_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
# A whole request waits for at most twice `max_wait_s`, and runs for at most `max_run_s`: 660 s by default.
_REQUEST_S = (*_LATENCY_S, 128.0, 256.0, 512.0, 1024.0)
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


# Requests, as clients see them.
REQUESTS = Spec(
    "graft_requests_total", "counter", "Requests that were answered; code 499: the client disconnected.",
    ("adapter", "route", "code"),
)  # fmt: skip
FAILED = Spec(
    "graft_failed_requests_total", "counter",
    "Answers of 500 and more, and callers that left after 30 s without a byte of an answer.",
    ("adapter",),
)  # fmt: skip
REQUEST_SECONDS = Spec(
    "graft_request_duration_seconds", "histogram", "From the request's arrival to the end of its answer.",
    ("adapter",), _REQUEST_S,
)  # fmt: skip
FIRST_TOKEN_SECONDS = Spec(
    "graft_time_to_first_token_seconds", "histogram",
    "From the request's arrival to the first chunk of a streamed answer; includes queue, load and prefill.",
    ("adapter",), _REQUEST_S,
)  # fmt: skip
TOKEN_SECONDS = Spec(
    "graft_time_per_output_token_seconds", "histogram",
    "Mean time between the tokens of a request, after the first; one observation a request.",
    ("adapter",), _TOKEN_S,
)  # fmt: skip
WAIT_SECONDS = Spec(
    "graft_queue_wait_seconds", "histogram",
    "From the request's arrival in its adapter's queue until it may run; includes the adapter's load, if any.",
    ("adapter",), _LATENCY_S,
)  # fmt: skip
PROMPT_TOKENS = Spec("graft_prompt_tokens_total", "counter", "Prompt tokens of finished requests.", ("adapter",))
CACHED_TOKENS = Spec(
    "graft_cached_prompt_tokens_total", "counter", "Prompt tokens that the prefix cache held.", ("adapter",)
)
GENERATED_TOKENS = Spec(
    "graft_generated_tokens_total", "counter", "Generated tokens of finished requests.", ("adapter",)
)
REJECTED = Spec(
    "graft_rejected_requests_total", "counter",
    "Requests that Graft answered with an error of its own, by the error's code (docs/reference/errors.md).",
    ("reason",),
)  # fmt: skip
FORWARDED = Spec(
    "graft_forwarded_requests_total", "counter", "Requests that were forwarded to a replica which holds their adapter."
)
WAITING = Spec("graft_requests_waiting", "gauge", "Requests that wait for an adapter slot.", ("adapter",))
WAITING_LIMIT = Spec("graft_requests_waiting_limit", "gauge", "Requests that may wait; more are refused.")
IN_FLIGHT = Spec("graft_requests_in_flight", "gauge", "Requests that have arrived and are not answered yet.")
BODY_BYTES = Spec(
    "graft_request_body_bytes", "gauge", "Bytes of the bodies of open requests; those that were announced count too."
)
BODY_BYTES_LIMIT = Spec("graft_request_body_bytes_limit", "gauge", "Bytes of bodies that are held; more are refused.")

# Adapters in their tiers.
HITS = Spec(
    "graft_adapter_hits_total", "counter",
    "Requests by where their adapter was; level: gpu, a slot; cpu, the engine's host memory; disk, neither.",
    ("adapter", "level"),
)  # fmt: skip
LOADS = Spec("graft_adapter_loads_total", "counter", "Loads into the engine; outcome: loaded, failed.",
             ("adapter", "outcome"))  # fmt: skip
LOAD_SECONDS = Spec(
    "graft_adapter_load_seconds", "histogram",
    "Time of a load; phase: fetch, copying files to this node; engine, loading them.",
    ("phase",), _LOAD_S,
)  # fmt: skip
UNLOADS = Spec("graft_adapter_unloads_total", "counter", "Adapters that were unloaded; reason: evicted, retired, lost.",
               ("adapter", "reason"))  # fmt: skip
REGISTERED = Spec("graft_adapters_registered", "gauge", "Names that the catalogue points to a revision.")
RESIDENT = Spec("graft_adapters_resident", "gauge", "Adapters that the engine holds.")
RESIDENT_LIMIT = Spec("graft_adapters_resident_limit", "gauge", "Adapters that the engine may hold.")
SLOTS_USED = Spec("graft_adapter_slots_used", "gauge", "Engine slots that an adapter uses.")
SLOTS = Spec("graft_adapter_slots", "gauge", "Engine slots: adapters that run at a time.")
FAILING = Spec("graft_adapters_failing", "gauge", "Revisions that this replica could not load or verify.")

# Changes.
SWAPS = Spec(
    "graft_changes_total", "counter",
    "Changes that this replica coordinated; outcome: done, unconfirmed, or the code of the error.",
    ("verb", "outcome"),
)  # fmt: skip
PUBLISH_SECONDS = Spec(
    "graft_publish_duration_seconds", "histogram",
    "Time of a publish; phase: stage, every replica loads and verifies it; promote, every replica switches to it.",
    ("phase",), _LATENCY_S,
)  # fmt: skip
PUBLISH_AGE = Spec("graft_publish_age_seconds", "gauge", "How long the oldest unfinished publish has been running.")
STAGED = Spec("graft_revisions_staged", "gauge", "Revisions that are staged and not promoted.")
CATALOGUE_EPOCH = Spec(
    "graft_catalogue_epoch", "gauge", "Number of the latest catalogue entry that this replica follows."
)
CATALOGUE_AGE = Spec("graft_catalogue_age_seconds", "gauge", "Time since this replica last read the catalogue.")
FOLLOW_FAILURES = Spec("graft_catalogue_failures_total", "counter", "Failed attempts to follow the catalogue.")
SPLIT_SHARE = Spec("graft_split_share", "gauge", "Share of a canary or shadow.", ("adapter", "kind"))
SPLIT_ERRORS = Spec(
    "graft_split_error_ratio", "gauge", "Share of the requests of each side that failed on this replica.",
    ("adapter", "side"),
)  # fmt: skip

ISSUER_FAILURES = Spec(
    "graft_issuer_failures_total", "counter", "Failed attempts to fetch the public keys of the identity provider."
)
ISSUER_KEYS_AGE = Spec(
    "graft_issuer_keys_age_seconds", "gauge", "Time since the public keys of the identity provider were fetched."
)

# Faults.
DRIFT = Spec(
    "graft_drift_repairs_total", "counter",
    "Repairs of what the engine held; kind: lost, an adapter loaded again; stranger, an unknown one unloaded.",
    ("kind",),
)  # fmt: skip
IDENTITY_CHECKS = Spec(
    "graft_identity_checks_total",
    "counter",
    "Checks whether a resident adapter still answers as it did when it was loaded.",
)
IDENTITY_VIOLATIONS = Spec(
    "graft_identity_violations_total", "counter",
    "Identity checks in which an adapter answered as another adapter or the base model would.",
    ("adapter",),
)  # fmt: skip
PROOF_FAILURES = Spec(
    "graft_proof_failures_total", "counter", "New revisions that failed their verification on this replica.",
    ("adapter",),
)  # fmt: skip

# State.
ENGINE_UP = Spec("graft_engine_up", "gauge", "1 while the engine can answer.")
READY = Spec("graft_replica_ready", "gauge", "1 once the replica holds what the catalogue asks for.")
REPLICAS_DESIRED = Spec(
    "graft_replicas_desired", "gauge", "Replicas that the settings ask for; with autoscaling the fewest there shall be."
)
BUILD = Spec("graft_build_info", "gauge", "Always 1.", ("version", "vllm_version"))
LINEAGE = Spec(
    "graft_adapter_info", "gauge",
    "Always 1: the revision that a name points to, and how it was trained and converted.",
    ("adapter", "revision", "training", "layout", "route", "source"),
)  # fmt: skip
CONVERSION_KL = Spec(
    "graft_adapter_conversion_kl_nats",
    "gauge",
    "Measured loss of the conversion: mean KL, in nats per token.",
    ("adapter",),
)
MEMORY_AVAILABLE = Spec(
    "graft_memory_available_bytes", "gauge", "Memory that is left on the machine, or in the container if that is less."
)
MEMORY_LIMIT = Spec("graft_memory_limit_bytes", "gauge", "Memory of the machine, or the limit of the container.")
DISK_AVAILABLE = Spec(
    "graft_disk_available_bytes", "gauge", "Room that is left on the disk of the state directory, where adapters lie."
)
DISK_SIZE = Spec("graft_disk_size_bytes", "gauge", "Size of that disk.")
EXPIRY = Spec(
    "graft_expiry_timestamp_seconds", "gauge", "When a certificate or a key expires; kind: certificate, key.",
    ("kind", "name"),
)  # fmt: skip

# For inference gateways: what vLLM itself exports under engine names, or will export (its pull request 54830).
GATEWAY_LORA = Spec(
    "vllm:lora_requests_info", "gauge",
    "With `requests_info`: adapters in slots, and that wait for one; the value is the time of the scrape.",
    ("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
)  # fmt: skip
GATEWAY_LOADED = Spec(
    "vllm:lora_adapter_loaded", "gauge", "1 while the adapter is resident; level: gpu, a slot; cpu, host memory.",
    ("adapter_name", "level", "pinned"),
)  # fmt: skip
GATEWAY_GPU = Spec("vllm:num_gpu_loaded_lora_adapters", "gauge", "Adapters in slots.")
GATEWAY_CPU = Spec("vllm:num_cpu_loaded_lora_adapters", "gauge", "Adapters in host memory.")
GATEWAY_SLOTS = Spec("vllm:max_gpu_lora_adapters", "gauge", "Slots.")

# Of the exporter: without `model_name`, because a replica that does not answer can't report it, and the proxy and the
# follower of adapters.yaml know none.
REPLICA_UP = Spec("graft_replica_up", "gauge", "1 if the replica returned its metrics in time.", ("replica",))
REPLICA_SCRAPE = Spec(
    "graft_replica_scrape_seconds", "gauge", "Time that reading the replica's metrics took.", ("replica",)
)

PROXY_UP = Spec("graft_proxy_up", "gauge", "1 if the HAProxy of this node told its statistics.")
PROXY_REQUESTS = Spec("graft_proxy_requests_total", "counter", "Requests that this HAProxy had for replicas.")
PROXY_UNANSWERED = Spec(
    "graft_proxy_unanswered_total", "counter",
    "Requests that this HAProxy itself answered with a 5xx, because no replica did: `graft_requests_total` lacks them.",
)  # fmt: skip
ADAPTERS_FILE_APPLIED = Spec(
    "graft_adapters_file_applied", "gauge", "1 if adapters.yaml was applied as it is now, 0 if something of it was not."
)

ALL: tuple[Spec, ...] = tuple(spec for spec in list(globals().values()) if isinstance(spec, Spec))
OF_EXPORTER = (REPLICA_UP, REPLICA_SCRAPE, PROXY_UP, PROXY_REQUESTS, PROXY_UNANSWERED, ADAPTERS_FILE_APPLIED)
