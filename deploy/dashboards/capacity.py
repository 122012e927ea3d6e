"""Whether there is enough of it: slots, host memory, KV cache, queues, replicas."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from deploy.dashboards.panels import (
    OF_ADAPTER,
    OF_MODEL,
    OF_NODE,
    RATE,
    TOKENS_A_SECOND,
    Parts,
    board,
    filled,
    lines,
    number,
    rate,
    row,
    share,
)

# Of a process, which knows no base model: of the replicas that have the chosen one.
_OF_REPLICAS = f"on (namespace, replica) graft_engine_up{{{OF_MODEL}}}"
_CPU = f"process_cpu_seconds_total{{{OF_NODE}}}"


def capacity() -> Dashboard:
    empty = board("graft-capacity", "Graft / Capacity", "What is used of what there is, and what more would be for.")
    return filled(empty, (*_used(), *_adapters(), *_work()))


def _of(used: str, there: str) -> str:
    return share(f"sum({used}{{{OF_MODEL}}})", f"sum({there}{{{OF_MODEL}}})")


def _used() -> Parts:
    return (
        row("In use"),
        number("Slots", _of("graft_adapter_slots_used", "graft_adapter_slots"), "percentunit",
               "Engine slots that an adapter has.", warns=0.9, alarms=1, width=4),
        number("Host memory", _of("graft_adapters_resident", "graft_adapters_resident_limit"), "percentunit",
               "Places for resident adapters.", warns=0.9, alarms=1, width=4),
        number("Queue", _of("graft_requests_waiting", "graft_requests_waiting_limit"), "percentunit",
               "Of the requests that may wait.", warns=0.5, alarms=0.8, width=4),
        number("KV cache", f"max(vllm:kv_cache_usage_perc{{{OF_MODEL}}})", "percentunit", "The fullest replica.",
               warns=0.8, alarms=0.95, width=4),
        number("Cold requests",
               share(f'sum(rate(graft_adapter_hits_total{{{OF_ADAPTER},level="disk"}}[5m])) or vector(0)',
                     f"sum(rate(graft_adapter_hits_total{{{OF_ADAPTER}}}[5m]))"), "percentunit",
               "Of those that want an adapter: they waited for a load.", warns=0.05, alarms=0.3, width=4),
        number("Replicas", f"count(graft_engine_up{{{OF_MODEL}}})", "short", "That tell their metrics.", width=4),
    )  # fmt: skip


def _adapters() -> Parts:
    return (
        row("Adapters: the working set and the places"),
        lines("Working set", [(_asked("5m"), "asked in 5 minutes"), (_asked("1h"), "asked in an hour"),
                              (f"min(graft_adapters_resident_limit{{{OF_MODEL}}})", "places in host memory"),
                              (f"min(graft_adapter_slots{{{OF_MODEL}}})", "slots")], "short",
              "Adapters with a series of their own, the base model among them. Above the places: loads without end."),
        lines("Registered, resident, in slots", [(f"max(graft_adapters_registered{{{OF_MODEL}}})", "registered"),
                                                 (f"max(graft_adapters_resident{{{OF_MODEL}}})", "resident"),
                                                 (f"max(graft_adapter_slots_used{{{OF_MODEL}}})", "in slots")], "short",
              "The fullest replica."),
        lines("Time spent loading", [(rate("graft_adapter_load_seconds_sum", OF_MODEL, "replica"), "{{replica}}")],
              "percentunit", "Of every second; near 1 the engine does little else."),
    )  # fmt: skip


def _asked(window: str) -> str:
    return f"count(sum by (adapter) (increase(graft_requests_total{{{OF_ADAPTER}}}[{window}])) > 0) or vector(0)"


def _work() -> Parts:
    return (
        row("Work by replica"),
        lines("Requests", [(rate("graft_requests_total", OF_MODEL, "replica"), "{{replica}}")], "reqps",
              "Uneven: see the requests that were passed on.", stacked=True),
        lines("Through HAProxy",
              [(f'sum by (instance) (rate(graft_proxy_requests_total{{namespace=~"$namespace"}}[{RATE}]))',
                "{{instance}}")], "reqps", "By node, for every base model of the namespace.", stacked=True),
        lines("Passed on to a holder", [(rate("graft_forwarded_requests_total", OF_MODEL, "replica"), "{{replica}}")],
              "reqps", "Another replica had the adapter."),
        lines("Generated tokens", [(rate("vllm:generation_tokens_total", OF_MODEL, "replica"), "{{replica}}")],
              TOKENS_A_SECOND, "By vLLM's own count.", stacked=True),
        lines("Replicas", [(f"sum(graft_replica_ready{{{OF_MODEL}}})", "ready"),
                           (f"sum(max by (namespace, model_name) (graft_replicas_desired{{{OF_MODEL}}}))", "desired")],
              "short", "With autoscaling, desired are the fewest there shall be."),
        lines("In flight", [(f"sum by (replica) (graft_requests_in_flight{{{OF_MODEL}}})", "{{replica}}")], "short",
              "Arrived and not answered yet.", stacked=True),
        lines("Request bodies", [(share(f"max by (replica) (graft_request_body_bytes{{{OF_MODEL}}})",
                                        f"min by (replica) (graft_request_body_bytes_limit{{{OF_MODEL}}})"),
                                  "{{replica}}")],
              "percentunit", "Of the memory for them; near 1 requests are refused.", highest=1),
        lines("KV cache", [(f"max by (replica) (vllm:kv_cache_usage_perc{{{OF_MODEL}}})", "{{replica}}")],
              "percentunit", "Of each replica.", highest=1),
        lines("CPU", [(f"sum by (replica) (rate({_CPU}[{RATE}]) and {_OF_REPLICAS})", "{{replica}}")],
              "short", "Cores of each replica's process."),
        lines("Memory left", [(share(f"min by (replica) (graft_memory_available_bytes{{{OF_MODEL}}})",
                                     f"min by (replica) (graft_memory_limit_bytes{{{OF_MODEL}}})"), "{{replica}}")],
              "percentunit", "Of the machine, or of the container's limit. Below 5 % an alert fires.", highest=1),
        lines("Disk left", [(share(f"min by (replica) (graft_disk_available_bytes{{{OF_MODEL}}})",
                                   f"min by (replica) (graft_disk_size_bytes{{{OF_MODEL}}})"), "{{replica}}")],
              "percentunit", "Where adapters lie. Below 10 % an alert fires.", highest=1),
    )  # fmt: skip
