"""Adapter by adapter: how each is served, where it is held, and what was published."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from deploy.dashboards.panels import (
    OF_ADAPTER,
    OF_MODEL,
    RATE,
    Parts,
    board,
    failed_share,
    filled,
    lines,
    quantile,
    rate,
    row,
    rows_of,
    share,
)

_NOT_SHOWN = ("instance", "job", "model_name", "replica", "namespace", "pod", "container")


def adapters() -> Dashboard:
    empty = board("graft-adapters", "Graft / Adapters", "Each adapter's service level, residency and revisions.")
    return filled(empty, (*_service(), *_residency(), *_revisions()))


def _service() -> Parts:
    by = "adapter"
    return (
        row("Service level"),
        lines("Requests", [(rate("graft_requests_total", OF_ADAPTER, by), "{{adapter}}")], "reqps",
              "`(other)`: adapters that are asked too seldom for a series of their own; `(base)`: no adapter.",
              stacked=True),
        lines("Failed share", [(failed_share(by), "{{adapter}}")], "percentunit", "Answers of 500 and more."),
        lines("Availability budget burn, 1 h",
              [('graft:availability:burn1h{adapter=~"$adapter",model_name=~"$model"}', "{{adapter}}")], "short",
              "1: what the objective allows for ever. Alerts at 14.4 (with the last 5 minutes) and 6 (6 hours)."),
        lines("First token, p95", [(quantile(0.95, "graft_time_to_first_token_seconds", OF_ADAPTER, by),
                                    "{{adapter}}")], "s", "Of streams: queue, load and prefill included."),
        lines("Time per token, p95", [(quantile(0.95, "graft_time_per_output_token_seconds", OF_ADAPTER, by),
                                       "{{adapter}}")], "s", "After the first one; each request's mean."),
        lines("First token budget burn, 1 h",
              [('graft:first_token:burn1h{adapter=~"$adapter",model_name=~"$model"}', "{{adapter}}")], "short",
              "1: as many slow first tokens as the objective allows for ever."),
        lines("Generated tokens", [(rate("graft_generated_tokens_total", OF_ADAPTER, by), "{{adapter}}")], "short",
              "A second, of finished answers.", stacked=True),
        lines("Prompt tokens", [(rate("graft_prompt_tokens_total", OF_ADAPTER, by), "{{adapter}}")], "short",
              "A second.", stacked=True),
        lines("Prompt tokens from the prefix cache",
              [(share(rate("graft_cached_prompt_tokens_total", OF_ADAPTER, by),
                      rate("graft_prompt_tokens_total", OF_ADAPTER, by)), "{{adapter}}")], "percentunit",
              "A new revision begins with an empty cache.", highest=1),
    )  # fmt: skip


def _residency() -> Parts:
    return (
        row("Residency"),
        lines("Where requests found their adapter",
              [(rate("graft_adapter_hits_total", OF_ADAPTER, "level"), "{{level}}")], "reqps",
              "gpu: in a slot; cpu: in host memory; disk: it was loaded for them.", stacked=True),
        lines("Cold share by adapter",
              [(share(f'sum by (adapter) (rate(graft_adapter_hits_total{{{OF_ADAPTER},level="disk"}}[{RATE}])) or '
                      f"0 * {rate('graft_adapter_hits_total', OF_ADAPTER, 'adapter')}",
                      rate("graft_adapter_hits_total", OF_ADAPTER, "adapter")), "{{adapter}}")], "percentunit",
              "Requests that waited for a load.", highest=1),
        lines("Wait for a slot, p95", [(quantile(0.95, "graft_queue_wait_seconds", OF_ADAPTER, "adapter"),
                                        "{{adapter}}")], "s", "Its turn, and the load if there is one."),
        lines("Loads by adapter", [(rate("graft_adapter_loads_total", OF_ADAPTER, "adapter, outcome"),
                                    "{{adapter}} {{outcome}}")], "ops", "Into the engine."),
        lines("Evictions and retirements", [(rate("graft_adapter_unloads_total", OF_ADAPTER, "adapter, reason"),
                                             "{{adapter}} {{reason}}")], "ops", "evicted: to make room for another."),
        lines("Load time, p95", [(quantile(0.95, "graft_adapter_load_seconds", OF_MODEL, "phase"), "{{phase}}")], "s",
              "fetch: the files brought to this machine; engine: into vLLM."),
        rows_of("Resident now", f"sum by (adapter_name, level, pinned) (vllm:lora_adapter_loaded{{{OF_MODEL}}})",
                "By every replica together.", ()),
        lines("Resident", [(f"sum by (level) (vllm:lora_adapter_loaded{{{OF_MODEL}}})", "{{level}}")], "short",
              "gpu: has a slot; cpu: in host memory only.", width=12, stacked=True),
    )  # fmt: skip


def _revisions() -> Parts:
    return (
        row("Revisions"),
        rows_of("What each name means, and how it was made",
                f"max by (adapter, revision, training, layout, route, source) (graft_adapter_info{{{OF_ADAPTER}}})",
                "From the manifest of the artifact.", _NOT_SHOWN, width=24),
        lines("Changes", [(f"sum by (verb, outcome) (increase(graft_changes_total{{{OF_MODEL}}}[5m]))",
                           "{{verb}}: {{outcome}}")], "short", "Of five minutes."),
        lines("Publish, p95", [(quantile(0.95, "graft_publish_duration_seconds", OF_MODEL, "phase"), "{{phase}}")], "s",
              "stage: until every replica held and proved it; promote: until every replica answered with it."),
        lines("Canary and shadow",
              [(f"max by (adapter, kind) (graft_split_share{{{OF_ADAPTER}}})", "{{adapter}} {{kind}}"),
               (f"max by (adapter, side) (graft_split_error_ratio{{{OF_ADAPTER}}})", "{{adapter}} failed: {{side}}")],
              "percentunit", "Share, and failures of each side."),
    )  # fmt: skip
