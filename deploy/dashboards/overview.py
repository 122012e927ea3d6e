"""What a person on call looks at first: does it answer, how fast, what waits, what changed."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from deploy.dashboards.panels import (
    OF_ADAPTER,
    OF_ALERT,
    OF_MODEL,
    TOKENS_A_SECOND,
    Parts,
    board,
    busiest,
    failed_share,
    filled,
    lines,
    number,
    quantile,
    rate,
    row,
    share,
)

# Each replica tells it; of every base model and namespace once.
_DESIRED = f"sum(max by (namespace, model_name) (graft_replicas_desired{{{OF_MODEL}}}))"
_TTFT = "graft_time_to_first_token_seconds"


def overview() -> Dashboard:
    empty = board("graft-overview", "Graft / Overview", "Whether it answers, how fast, what waits and what changed.")
    return filled(empty, (*_now(), *_callers(), *_queues(), *_changes()))


def _now() -> Parts:
    return (
        row("Now"),
        number("Replicas ready", f"sum(graft_replica_ready{{{OF_MODEL}}})", "short",
               "They hold what the catalogue asks for.", warns=1, alarms=1, falling=True),
        number("Of desired", share(f"sum(graft_replica_ready{{{OF_MODEL}}})", _DESIRED), "percentunit",
               "Ready replicas of those that the settings ask for; with autoscaling of the fewest there shall be.",
               warns=1, alarms=0.5, falling=True),
        number("Alerts", f'count(ALERTS{{{OF_ALERT},alertstate="firing",alertname=~"Graft.*"}}) or vector(0)', "short",
               "Firing now.", warns=1, alarms=1),
        number("Requests", rate("graft_requests_total", OF_ADAPTER), "reqps", "Answered, of every code."),
        number("Failed", failed_share(window="5m"), "percentunit",
               "Answers of 500 and more, and callers that gave up, in five minutes.", warns=0.001, alarms=0.01),
        number("First token, p95", quantile(0.95, _TTFT, OF_ADAPTER), "s",
               "Of streams: queue, load and prefill included.", warns=1, alarms=2),
        number("Waiting", f"sum(graft_requests_waiting{{{OF_MODEL}}})", "short",
               "Requests that wait for an adapter slot.", warns=1, alarms=64),
        number("Generated", rate("graft_generated_tokens_total", OF_ADAPTER), TOKENS_A_SECOND, "Of finished answers."),
    )  # fmt: skip


def _callers() -> Parts:
    return (
        row("What callers see"),
        lines("Requests by code", [(rate("graft_requests_total", OF_ADAPTER, "code"), "{{code}}")], "reqps",
              "499: the caller left.", stacked=True),
        lines("Failed share by adapter",
              [busiest(failed_share("adapter")), (failed_share(), "all")],
              "percentunit", "Answers of 500 and more, and callers that gave up after 30 s; the ten worst."),
        lines("Refused by Graft, by reason",
              [(rate("graft_rejected_requests_total", OF_MODEL, "reason"), "{{reason}}")], "reqps",
              "Error codes of docs/reference/errors.md."),
        lines("Time to first token", [(quantile(q, _TTFT, OF_ADAPTER), f"p{q * 100:g}") for q in (0.5, 0.95, 0.99)],
              "s", "Of streams, from the request's arrival."),
        lines("Time per token", [(quantile(q, "graft_time_per_output_token_seconds", OF_ADAPTER), f"p{q * 100:g}")
                                 for q in (0.5, 0.95, 0.99)], "s", "After the first one; each request's mean."),
        lines("Whole answers", [(quantile(q, "graft_request_duration_seconds", OF_ADAPTER), f"p{q * 100:g}")
                                for q in (0.5, 0.95, 0.99)], "s", "From the request's arrival to the last byte."),
    )  # fmt: skip


def _queues() -> Parts:
    return (
        row("What waits"),
        lines("Waiting for a slot, by adapter",
              [busiest(f"sum by (adapter) (graft_requests_waiting{{{OF_ADAPTER}}})")], "short",
              "The ten longest queues.", stacked=True),
        lines("Wait for a slot", [(quantile(q, "graft_queue_wait_seconds", OF_ADAPTER), f"p{q * 100:g}")
                                  for q in (0.5, 0.95, 0.99)], "s", "Its turn, and the load if there is one."),
        lines("In the engines", [(f"sum(vllm:num_requests_running{{{OF_MODEL}}})", "running"),
                                 (f"sum(vllm:num_requests_waiting{{{OF_MODEL}}})", "waiting in the engine"),
                                 (f"sum(graft_requests_in_flight{{{OF_MODEL}}})", "in flight")], "short",
              "As vLLM counts them, and all that have arrived."),
    )  # fmt: skip


def _changes() -> Parts:
    return (
        row("What changed, and what must not"),
        lines("Changes by outcome",
              [(f"sum by (verb, outcome) (increase(graft_changes_total{{{OF_MODEL}}}[5m])) > 0",
                "{{verb}}: {{outcome}}"),
               (f"sum(increase(graft_changes_total{{{OF_MODEL}}}[5m]))", "all")], "short",
              "Of five minutes."),
        lines("Loads and evictions", [(rate("graft_adapter_loads_total", OF_MODEL, "outcome"), "{{outcome}}"),
                                      (rate("graft_adapter_unloads_total", OF_MODEL, "reason"), "{{reason}}")], "ops",
              "Many of both: more adapters are in use than fit."),
        lines("Drift and identity",
              [(f"sum by (kind) (increase(graft_drift_repairs_total{{{OF_MODEL}}}[5m]))", "drift: {{kind}}"),
               (f"sum(increase(graft_identity_violations_total{{{OF_MODEL}}}[5m]))", "identity violations")], "short",
              "Of five minutes; all zero."),
        lines("Age of the catalogue",
              [(f"max by (replica) (graft_catalogue_age_seconds{{{OF_MODEL}}})", "{{replica}}")], "s",
              "Since a replica read it. It grows while the catalogue can't be read."),
        lines("Answered by HAProxy itself",
              [('sum(rate(graft_proxy_unanswered_total{namespace=~"$namespace"}[5m]))', "no replica answered")],
              "reqps", "503 `engine_unavailable`, of every base model of the namespace: no replica saw them."),
    )  # fmt: skip
