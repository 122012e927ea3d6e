"""What docs/report.md says about each benchmark: its claim and its headline figures, by their keys in the results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """One benchmark on the page. `claim` is a format string over the values of all figures of the result; `headline`
    maps the keys of at most eight figures to what they are called on the page; `method` is the page that describes
    the measurement, relative to docs/."""

    name: str
    title: str
    claim: str
    method: str
    headline: Mapping[str, str]


_BENCHMARKS = "explanation/benchmarks.md"
_GATEWAY = {
    "worst_throughput_ratio": "Throughput in the worst of eight loads",
    "added_ttft_p50_ms_c1": "Added time to first token, one caller, median",
    "cpu_per_streamed_request_ratio": "CPU outside the engine for each streamed request",
    "throughput_ratio_stream_c32": "Throughput, 32 streaming callers",
    "cpu_ratio_stream_c1": "CPU outside the engine, one streaming caller",
    "bare_stream_c32_front_end_cpu_ms": "vLLM: CPU outside the engine, 32 streaming callers",
    "graft_stream_c32_front_end_cpu_ms": "Graft: CPU outside the engine, 32 streaming callers",
    "other_processes": "Cores that other processes used meanwhile",
}

SECTIONS = (
    Section(
        "convert",
        "Merge speed and memory",
        "Merging a LoRA into a model of Llama-3.2-3B's shape runs at {merge_w16_vs_cp:.2f} times the median speed of "
        "`cp` with fsync (whose own spread is below); PEFT's load, merge and save runs at {peft_vs_cp:.2f} times. Peak "
        "memory is {merge_rss_over_budget:.0%} of the budget.",
        f"{_BENCHMARKS}#make-bench-convert",
        {
            "merge_w16_vs_cp": "Merge into the original weights, speed over `cp`",
            "merge_dq_vs_cp": "Merge into the dequantized NF4 base, speed over `cp`",
            "peft_vs_cp": "PEFT's load, merge and save, speed over `cp`",
            "cp_s": "`cp` and fsync",
            "original_s": "Merge into the original weights",
            "merge_rss_over_budget": "Memory, merge into the original weights",
            "merge_dq_rss_over_budget": "Memory, merge into the dequantized NF4 base",
            "exact_kl_over_floor": "KL of the exact route over the noise of bfloat16",
        },
    ),
    Section(
        "routes",
        "Quality of each conversion route",
        "A QLoRA fine-tune served as 4-bit base and adapter, the default, has a KL of {adapter_kl_chat:.2g} nats per "
        "token to the function as trained. PEFT's merge into the 4-bit base has {peft_nf4_kl_chat:.2g}, and the base "
        "without the adapter {base_kl_chat:.2g}.",
        f"{_BENCHMARKS}#make-bench-routes",
        {
            "adapter_kl_chat": "4-bit base and adapter, chats as in training",
            "adapter_kl_other_text": "4-bit base and adapter, other text",
            "exact_float16_kl_chat": "Exact merge, float16, chats",
            "exact_float16_kl_other_text": "Exact merge, float16, other text",
            "exact_bfloat16_kl_chat": "Exact merge, bfloat16, chats",
            "recover_64_kl_chat": "Recovered to full precision, rank 64, chats",
            "original_bfloat16_kl_chat": "Merge into the original base instead, bfloat16, chats",
            "peft_nf4_kl_chat": "PEFT's merge into the 4-bit base, chats",
        },
    ),
    Section(
        "swap",
        "Hot-swap under load",
        "{swaps:,.0f} hot-swaps under load on {replicas:.0f} engines: {requests:,.0f} requests, {failed_requests:,.0f} "
        "failed, {mixed_or_stale_responses:,.0f} answers mixed or from a replaced revision. vLLM's `load_inplace` gave "
        "{bare_mixed_or_stale_responses:,.0f} such answers of {bare_requests:,.0f}.",
        f"{_BENCHMARKS}#make-bench-swap",
        {
            "failed_requests": "Failed requests",
            "mixed_or_stale_responses": "Answers mixed or from a replaced revision",
            "publish_overhead_s": "Publish, beyond vLLM's own load call",
            "rollback_ms": "Rollback",
            "registered_10k_latency_ratio": "Latency, 10,000 registered adapters over 10",
            "registered_10k_memory_ratio": "Memory, 10,000 registered adapters over 10",
            "cold_vs_bare_load": "Cold start over vLLM's own load call",
            "working_set_throughput_over_bare": "Throughput with twice as many adapters as slots, over vLLM",
        },
    ),
    Section(
        "gateway",
        "Gateway with an adapter",
        "With an adapter on a tiny model, Graft's throughput is at least {worst_throughput_ratio:.2f} times that of "
        "vLLM's own API server in eight loads. This compares whole products: Graft also applies adapters on a CPU with "
        "its own code.",
        f"{_BENCHMARKS}#make-bench-gateway",
        _GATEWAY,
    ),
    Section(
        "gateway_merged",
        "Gateway with a merged model",
        "Both sides run the same engine code here, so the difference is the gateway alone. In the worst of eight loads "
        "Graft's throughput is {worst_throughput_ratio:.2f} times that of vLLM's own API server.",
        f"{_BENCHMARKS}#make-bench-gateway",
        _GATEWAY,
    ),
    Section(
        "gateway_real",
        "Gateway with a model that keeps its engine busy",
        "For a fine-tune of SmolLM2-135M, merged and quantized to int8, Graft's throughput in the worst of eight loads "
        "is {worst_throughput_ratio:.2f} times that of vLLM's own API server. CPU outside the engine is "
        "{cpu_per_streamed_request_ratio:.2f} times as much for each request.",
        f"{_BENCHMARKS}#make-bench-gateway",
        _GATEWAY,
    ),
    Section(
        "cpu_adapters",
        "Adapters on a CPU",
        "Two fine-tunes of SmolLM2-135M over their 4-bit base: a prompt of 600 tokens takes {prompt_time_ratio:.2f} "
        "times as long as on vLLM's own server, and eight callers of one adapter get "
        "{one_adapter_throughput_ratio:.2f} times the tokens per second.",
        f"{_BENCHMARKS}#make-bench-cpu-adapters",
        {
            "prompt_time_ratio": "Time of a prompt of 600 tokens, one adapter",
            "one_adapter_throughput_ratio": "Tokens per second, eight callers, one adapter",
            "two_adapters_throughput_ratio": "Tokens per second, eight callers, two adapters",
            "engine_memory_ratio": "Peak memory of the engine",
            "bare_adapter_prompt_ms": "vLLM: prompt for an adapter",
            "graft_adapter_prompt_ms": "Graft: prompt for an adapter",
            "bare_base_prompt_ms": "vLLM: prompt for the base model",
            "graft_base_prompt_ms": "Graft: prompt for the base model",
        },
    ),
    Section(
        "chaos",
        "Faults under load",
        "{faults:.0f} faults during {requests:,.0f} requests: {wrong_answers:,.0f} wrong answers, {hung_requests:,.0f} "
        "hung, {acknowledged_lost:,.0f} acknowledged publishes lost. {failed_requests:,.0f} requests failed: "
        "{refused_clearly:,.0f} with an error that says to try again, {broken_off:,.0f} by a broken connection.",
        "explanation/faults.md",
        {
            "failed_requests": "Requests without an answer",
            "unclear_errors": "Errors of another form than the API's",
            "wrong_answers": "Wrong answers",
            "hung_requests": "Requests that hung",
            "publishes_acknowledged": "Publishes acknowledged",
            "acknowledged_lost": "Acknowledged publishes lost",
            "left_processes": "Processes of the server left behind",
            "worst_recovery_s": "Longest recovery",
        },
    ),
    Section(
        "soak",
        "Half an hour of mixed traffic",
        "{minutes:.0f} minutes with {requests:,.0f} requests and {swaps:,.0f} hot-swaps, callers that leave or read "
        "slowly, and invalid input: {failed_requests:,.0f} requests failed. Growth compares the last third of the run "
        "with the third before it.",
        "explanation/faults.md",
        {
            "failed_requests": "Failed requests",
            "wrong_answers": "Wrong answers",
            "swaps_refused": "Hot-swaps refused",
            "bad_inputs_with_a_server_error": "Invalid inputs answered with a server error",
            "memory_growth_ratio": "Growth of memory",
            "descriptor_growth_ratio": "Growth of open descriptors",
            "process_growth": "Growth in processes",
            "first_token_growth_ratio": "Growth of the time to first token",
        },
    ),
    Section(
        "hostile",
        "Invalid requests and damaged files",
        "{cases:,.0f} invalid requests and damaged files at {surfaces:.0f} interfaces and file formats: "
        "{crashed:,.0f} ended in a crash or server error, {hung:,.0f} hung, {leaked:,.0f} revealed a secret, "
        "{accepted:,.0f} were accepted that must be refused.",
        "explanation/faults.md",
        {
            "cases": "Cases",
            "surfaces": "Interfaces and file formats",
            "crashed": "Server errors and unexpected exceptions",
            "hung": "Hung",
            "escaped": "Wrote outside their directory",
            "leaked": "Revealed a secret",
            "killed": "Ended an engine or a replica",
            "accepted": "Accepted, though it must be refused",
        },
    ),
    Section(
        "merge_or_not",
        "Merge or keep adapters",
        "A simulation, not a measurement: 1,000 adapters with 20 requests per second between them need "
        "{slots_32_adapters_1000_together_gpus:,.0f} GPUs on a shared base, and "
        "{slots_32_adapters_1000_apart_gpus:,.0f} as merged models.",
        "how-to/choose-merge-or-adapters.md",
        {
            "slots_32_adapters_100_together_gpus": "100 adapters on a shared base",
            "slots_32_adapters_100_apart_gpus": "100 merged models",
            "slots_32_adapters_1000_together_gpus": "1,000 adapters on a shared base",
            "slots_32_adapters_1000_apart_gpus": "1,000 merged models",
            "slots_32_adapters_10000_together_gpus": "10,000 adapters on a shared base",
            "slots_32_adapters_10000_apart_gpus": "10,000 merged models",
            "slots_32_adapters_1000_cold": "Requests of 1,000 adapters that find theirs cold",
            "overhead_1.2_merging_pays_from": "Traffic of one adapter from which merging costs less",
        },
    ),
)
