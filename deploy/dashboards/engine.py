"""Inside vLLM: batch, KV cache, prefix cache, where the time of a request goes."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from deploy.dashboards.panels import (
    OF_GPU,
    OF_MODEL,
    OF_NODE,
    RATE,
    TOKENS,
    TOKENS_A_SECOND,
    Parts,
    board,
    filled,
    lines,
    quantile,
    rate,
    row,
    share,
)

_PHASES = {"queue": "vllm:request_queue_time_seconds", "prefill": "vllm:request_prefill_time_seconds",
           "decode": "vllm:request_decode_time_seconds"}  # fmt: skip
# Of a process, which knows no base model: of the replicas that have the chosen one.
_OF_REPLICAS = f"on (namespace, replica) graft_engine_up{{{OF_MODEL}}}"
_CPU, _MEMORY = f"process_cpu_seconds_total{{{OF_NODE}}}", f"process_resident_memory_bytes{{{OF_NODE}}}"
_SCRAPE = f"graft_replica_scrape_seconds{{{OF_NODE}}}"
_GPU = "{{Hostname}} {{gpu}}"


def engine() -> Dashboard:
    empty = board("graft-engine", "Graft / Engine", "vLLM's own metrics: batch, caches, and where the time goes.")
    return filled(empty, (*_load(), *_caches(), *_times(), *_processes(), *_gpus()))


def _load() -> Parts:
    return (
        row("Batch"),
        lines("Requests running", [(f"sum by (replica) (vllm:num_requests_running{{{OF_MODEL}}})", "{{replica}}")],
              "short", "In the batch now.", stacked=True),
        lines("Requests waiting in the engine",
              [(f"sum by (replica) (vllm:num_requests_waiting{{{OF_MODEL}}})", "{{replica}}")], "short",
              "For room in the batch or in the KV cache.", stacked=True),
        lines("Tokens of a step", [(quantile(q, "vllm:iteration_tokens_total", OF_MODEL), f"p{q * 100:g}")
                                   for q in (0.5, 0.95)], TOKENS, "Prefill and decode together."),
        lines("Tokens", [(rate("vllm:generation_tokens_total", OF_MODEL), "generated"),
                         (rate("vllm:prompt_tokens_total", OF_MODEL), "prompt")], TOKENS_A_SECOND, "As vLLM counts."),
        lines("Finished, by reason", [(rate("vllm:request_success_total", OF_MODEL, "finished_reason"),
                                       "{{finished_reason}}")], "reqps", "stop, length, abort, error.", stacked=True),
        lines("Preemptions", [(rate("vllm:num_preemptions_total", OF_MODEL, "replica"), "{{replica}}")], "ops",
              "Requests that lost their KV cache to others: there is too little of it."),
        lines("Length of prompts", [(quantile(q, "vllm:request_prompt_tokens", OF_MODEL), f"p{q * 100:g}")
                                    for q in (0.5, 0.95, 0.99)], TOKENS, "Of finished requests."),
        lines("Length of answers", [(quantile(q, "vllm:request_generation_tokens", OF_MODEL), f"p{q * 100:g}")
                                    for q in (0.5, 0.95, 0.99)], TOKENS, "Of finished requests."),
    )  # fmt: skip


def _caches() -> Parts:
    return (
        row("Caches"),
        lines("KV cache in use", [(f"max by (replica) (vllm:kv_cache_usage_perc{{{OF_MODEL}}})", "{{replica}}")],
              "percentunit", "Near 1: requests wait or are preempted.", highest=1),
        lines("Prefix cache hits", [(share(rate("vllm:prefix_cache_hits_total", OF_MODEL, "replica"),
                                           rate("vllm:prefix_cache_queries_total", OF_MODEL, "replica")),
                                     "{{replica}}")], "percentunit", "Of prompt tokens looked up.", highest=1),
        lines("Engine up", [(f"min by (replica) (graft_engine_up{{{OF_MODEL}}})", "{{replica}}")], "short",
              "1 while it can answer.", highest=1),
    )  # fmt: skip


def _times() -> Parts:
    return (
        row("Where the time goes"),
        lines("Mean of each phase",
              [(share(f"sum(rate({name}_sum{{{OF_MODEL}}}[{RATE}]))", f"sum(rate({name}_count{{{OF_MODEL}}}[{RATE}]))"),
                phase) for phase, name in _PHASES.items()], "s", "Of a request, inside the engine.", stacked=True),
        lines("First token: engine and caller",
              [(quantile(0.95, "vllm:time_to_first_token_seconds", OF_MODEL), "engine, p95"),
               (quantile(0.95, "graft_time_to_first_token_seconds", OF_MODEL), "caller, p95")], "s",
              "The difference is the wait for an adapter, and the gateway."),
        lines("Between tokens", [(quantile(q, "vllm:inter_token_latency_seconds", OF_MODEL), f"p{q * 100:g}")
                                 for q in (0.5, 0.95, 0.99)], "s", "Every single one."),
    )  # fmt: skip


def _processes() -> Parts:
    return (
        row("Processes"),
        lines("Memory", [(f"sum by (replica) ({_MEMORY} and {_OF_REPLICAS})", "{{replica}}")], "bytes",
              "Of the replica's process; the engine core has one of its own."),
        lines("CPU", [(f"sum by (replica) (rate({_CPU}[{RATE}]) and {_OF_REPLICAS})", "{{replica}}")],
              "short", "Cores of the replica's process: gateway, tokenizer, streams."),
        lines("Time to tell the metrics", [(f"max by (replica) ({_SCRAPE} and {_OF_REPLICAS})",
                                            "{{replica}}")], "s", "Long: the replica's event loop is busy."),
    )  # fmt: skip


def _gpus() -> Parts:
    """Where NVIDIA's DCGM exporter is scraped."""
    return (
        row("GPUs, by NVIDIA's DCGM exporter"),
        lines("GPU use", [(_gpu("DCGM_FI_DEV_GPU_UTIL"), _GPU)], "percent", "Of the time a kernel ran.", highest=100),
        lines("GPU memory in use", [(_gpu("DCGM_FI_DEV_FB_USED"), _GPU)], "mbytes", "vLLM takes its share at once."),
        lines("GPU temperature", [(_gpu("DCGM_FI_DEV_GPU_TEMP"), _GPU)], "celsius", "Too hot, it becomes slower."),
        lines("GPU power", [(_gpu("DCGM_FI_DEV_POWER_USAGE"), _GPU)], "watt", "Little under load: the GPU waits."),
        lines("GPU errors (Xid)", [(_gpu("DCGM_FI_DEV_XID_ERRORS"), _GPU)], "none",
              "The number of the last one; see the runbook of GraftGpuSick."),
        lines("GPU memory rows replaced", [(_gpu("DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS"), _GPU)], "short",
              "After errors that could not be corrected. More and more: the GPU should be replaced."),
    )  # fmt: skip


def _gpu(metric: str) -> str:
    return f"max by (Hostname, gpu) ({metric}{{{OF_GPU}}})"
