"""The load of `benchmarks.gateway`: vLLM's own serving benchmark, also for answers that are not streamed.

vLLM's generator only streams. `whole` is a further request function for it, timed and counted by the same code.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INPUT_TOKENS = 16
OUTPUT_TOKENS = 32
_WHOLE_BACKEND = "graft-whole"


@dataclass(frozen=True)
class Workload:
    """One closed-loop load: the number of callers, and whether they stream."""

    concurrency: int
    streams: bool

    @property
    def name(self) -> str:
        return f"{'stream' if self.streams else 'whole'}_c{self.concurrency}"


@dataclass(frozen=True)
class LoadResult:
    """The result of the load generator, in milliseconds. `itl` is the time between tokens, 0 without streaming."""

    requests: int
    failed: int
    requests_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    itl_p50_ms: float
    itl_p99_ms: float


def generate(url: str, model: str, tokenizer: Path, workload: Workload, requests: int, seed: int) -> LoadResult:
    """Run one load. Raises RuntimeError if a request failed, because a failed request would count as a fast one."""
    from vllm.benchmarks import serve

    _register_whole_backend()
    parser = argparse.ArgumentParser()
    serve.add_cli_args(parser)
    arguments = parser.parse_args([
        *("--backend", "openai" if workload.streams else _WHOLE_BACKEND, "--base-url", url),
        *("--endpoint", "/v1/completions"),
        *("--model", model, "--tokenizer", str(tokenizer), "--dataset-name", "random", "--seed", str(seed)),
        *("--random-input-len", str(INPUT_TOKENS), "--random-output-len", str(OUTPUT_TOKENS)),
        *("--num-prompts", str(requests), "--max-concurrency", str(workload.concurrency)),
        *("--num-warmups", str(min(workload.concurrency, requests)), "--temperature", "0", "--ignore-eos"),
        *("--percentile-metrics", "ttft,itl", "--metric-percentiles", "50,99", "--disable-tqdm"),
        *("--ready-check-timeout-sec", "0"),
    ])  # fmt: skip
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        result = asyncio.run(serve.main_async(arguments))
    if result["failed"]:
        raise RuntimeError(f"{result['failed']} of {requests} requests failed:\n{output.getvalue()[-2000:]}")
    return _load_result(result)


def _load_result(result: dict[str, Any]) -> LoadResult:
    return LoadResult(
        requests=result["completed"],
        failed=result["failed"],
        requests_per_s=result["request_throughput"],
        ttft_p50_ms=result["p50_ttft_ms"],
        ttft_p99_ms=result["p99_ttft_ms"],
        itl_p50_ms=result["p50_itl_ms"],
        itl_p99_ms=result["p99_itl_ms"],
    )


def _register_whole_backend() -> None:
    from vllm.benchmarks.lib import endpoint_request_func as functions

    functions.ASYNC_REQUEST_FUNCS[_WHOLE_BACKEND] = request_without_stream
    if _WHOLE_BACKEND not in functions.OPENAI_COMPATIBLE_BACKENDS:
        functions.OPENAI_COMPATIBLE_BACKENDS.append(_WHOLE_BACKEND)


async def request_without_stream(request_func_input: Any, session: Any, pbar: Any = None) -> Any:
    """vLLM's `RequestFunc` without streaming; the time to first token is the time of the complete answer."""
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput

    load_input = request_func_input
    body = {
        "model": load_input.model,
        "prompt": load_input.prompt,
        "max_tokens": load_input.output_len,
        "ignore_eos": load_input.ignore_eos,
        **(load_input.extra_body or {}),
    }
    output = RequestFuncOutput(prompt_len=load_input.prompt_len)
    began = output.start_time = time.perf_counter()
    async with session.post(load_input.api_url, json=body) as response:
        answer = await response.json()
    output.ttft = output.latency = time.perf_counter() - began
    output.success = response.status == 200
    if output.success:
        output.generated_text = answer["choices"][0]["text"]
        output.output_tokens = answer["usage"]["completion_tokens"]
    else:
        output.error = str(answer)
    return output
