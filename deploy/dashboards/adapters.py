"""Adapter by adapter: how each is served, where it is held, and what was published."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from deploy.dashboards.panels import (
    OF_ADAPTER,
    OF_MODEL,
    RATE,
    TOKENS_A_SECOND,
    Parts,
    board,
    busiest,
    failed_share,
    filled,
    lines,
    quantile,
    rate,
    row,
    rows_of,
    share,
)

_OF_BURN = 'namespace=~"$namespace",model_name=~"$model",adapter=~"$adapter"'  # of all replicas together
_RESIDENT = {"adapter_name": 0, "level": 80, "pinned": 80}
# A revision's first twelve digits name it; the base model is long, and comes last.
_LINEAGE = {"adapter": 220, "digest": 130, "training": 90, "layout": 130, "route": 130, "source": 0}
_DIGEST = f'label_replace(graft_adapter_info{{{OF_ADAPTER}}}, "digest", "$1", "revision", ".*@(.{{12}}).*")'


def adapters() -> Dashboard:
    empty = board("graft-adapters", "Graft / Adapters", "Each adapter's service level, residency and revisions.")
    return filled(empty, (*_service(), *_residency(), *_revisions()))


def _service() -> Parts:
    by = "adapter"
    return (
        row("Service level"),
        lines("Requests", [busiest(rate("graft_requests_total", OF_ADAPTER, by))], "reqps",
              "The ten busiest. `(other)`: adapters asked too seldom for a series of their own; `(base)`: no adapter.",
              stacked=True),
        lines("Failed share", [busiest(failed_share(by))], "percentunit",
              "Answers of 500 and more, and callers that left after 30 s without a byte. The ten worst."),
        lines("Availability budget burn, 1 h",
              [busiest(f"graft:availability:burn1h{{{_OF_BURN}}}")], "short",
              "1: what the objective allows for ever. Alerts at 14.4 (with the last 5 minutes) and 6 (6 hours)."),
        lines("First token, p95",
              [busiest(quantile(0.95, "graft_time_to_first_token_seconds", OF_ADAPTER, by))], "s",
              "Of streams: queue, load and prefill included."),
        lines("Time per token, p95",
              [busiest(quantile(0.95, "graft_time_per_output_token_seconds", OF_ADAPTER, by))], "s",
              "After the first one; each request's mean."),
        lines("First token budget burn, 1 h",
              [busiest(f"graft:first_token:burn1h{{{_OF_BURN}}}")], "short",
              "1: as many slow first tokens as the objective allows for ever."),
        lines("Generated tokens", [busiest(rate("graft_generated_tokens_total", OF_ADAPTER, by))],
              TOKENS_A_SECOND, "Of finished answers.", stacked=True),
        lines("Prompt tokens", [busiest(rate("graft_prompt_tokens_total", OF_ADAPTER, by))],
              TOKENS_A_SECOND, "Of finished answers.", stacked=True),
        lines("Prompt tokens from the prefix cache",
              [busiest(share(rate("graft_cached_prompt_tokens_total", OF_ADAPTER, by),
                              rate("graft_prompt_tokens_total", OF_ADAPTER, by)))], "percentunit",
              "A new revision begins with an empty cache.", highest=1),
    )  # fmt: skip


def _residency() -> Parts:
    return (
        row("Residency"),
        lines("Where requests found their adapter",
              [(rate("graft_adapter_hits_total", OF_ADAPTER, "level"), "{{level}}")], "reqps",
              "gpu: in a slot; cpu: in host memory; disk: it was loaded for them.", stacked=True),
        lines("Cold share by adapter",
              [busiest(share(
                  f'sum by (adapter) (rate(graft_adapter_hits_total{{{OF_ADAPTER},level="disk"}}[{RATE}])) or '
                  f"0 * {rate('graft_adapter_hits_total', OF_ADAPTER, 'adapter')}",
                  rate("graft_adapter_hits_total", OF_ADAPTER, "adapter")))], "percentunit",
              "Requests that waited for a load.", highest=1),
        lines("Wait for a slot, p95",
              [busiest(quantile(0.95, "graft_queue_wait_seconds", OF_ADAPTER, "adapter"))], "s",
              "Its turn, and the load if there is one."),
        lines("Loads by adapter",
              [busiest(rate("graft_adapter_loads_total", OF_ADAPTER, "adapter, outcome"), "{{adapter}} {{outcome}}")],
              "ops", "Into the engine."),
        lines("Evictions and retirements",
              [busiest(rate("graft_adapter_unloads_total", OF_ADAPTER, "adapter, reason"),
                       "{{adapter}} {{reason}}")], "ops", "evicted: to make room for another."),
        lines("Load time, p95", [(quantile(0.95, "graft_adapter_load_seconds", OF_MODEL, "phase"), "{{phase}}")], "s",
              "fetch: the files brought to this machine; engine: into vLLM."),
        rows_of("Resident now", f"sum by (adapter_name, level, pinned) (vllm:lora_adapter_loaded{{{OF_MODEL}}})",
                "By every replica together.", _RESIDENT),
        lines("Resident", [(f"sum by (level) (vllm:lora_adapter_loaded{{{OF_MODEL}}})", "{{level}}")], "short",
              "gpu: has a slot; cpu: in host memory only.", width=12, stacked=True),
    )  # fmt: skip


def _revisions() -> Parts:
    return (
        row("Revisions"),
        rows_of("What each name means, and how it was made",
                f"max by ({', '.join(_LINEAGE)}) ({_DIGEST})",
                "From the manifest of the artifact.", _LINEAGE, width=24),
        lines("Changes", [(f"sum by (verb, outcome) (increase(graft_changes_total{{{OF_MODEL}}}[5m]))",
                           "{{verb}}: {{outcome}}")], "short", "Of five minutes."),
        lines("Publish, p95", [(quantile(0.95, "graft_publish_duration_seconds", OF_MODEL, "phase"), "{{phase}}")], "s",
              "stage: until every replica held and proved it; promote: until every replica answered with it."),
        lines("Canary and shadow: share",
              [busiest(f"max by (adapter, kind) (graft_split_share{{{OF_ADAPTER}}})", "{{adapter}} {{kind}}")],
              "percentunit", "Of the requests of a name."),
        lines("Canary and shadow: failed",
              [busiest(f"max by (adapter, side) (graft_split_error_ratio{{{OF_ADAPTER}}})", "{{adapter}} {{side}}")],
              "percentunit", "Of the requests of each side, on the worst replica."),
    )  # fmt: skip
