"""The load of `benchmarks.gateway`: vLLM's own serving benchmark, with a second way to ask for answers that come whole.

Its generator asks for streams only; `whole` is a request function beside its own, counted and timed by the same code.
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
_WHOLE = "graft-whole"


@dataclass(frozen=True)
class Cell:
    """One load: so many callers that ask again at once, and whether they stream."""

    concurrency: int
    streams: bool

    @property
    def name(self) -> str:
        return f"{'stream' if self.streams else 'whole'}_c{self.concurrency}"


@dataclass(frozen=True)
class Told:
    """What the generator found. Milliseconds; times between tokens are 0 where answers come whole."""

    requests: int
    failed: int
    requests_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    itl_p50_ms: float
    itl_p99_ms: float


def generate(url: str, model: str, tokenizer: Path, cell: Cell, requests: int, seed: int) -> Told:
    """Run one load to its end. Raises RuntimeError if a request failed: a failure is not a fast answer."""
    from vllm.benchmarks import serve

    _offer_whole()
    parser = argparse.ArgumentParser()
    serve.add_cli_args(parser)
    arguments = parser.parse_args([
        *("--backend", "openai" if cell.streams else _WHOLE, "--base-url", url, "--endpoint", "/v1/completions"),
        *("--model", model, "--tokenizer", str(tokenizer), "--dataset-name", "random", "--seed", str(seed)),
        *("--random-input-len", str(INPUT_TOKENS), "--random-output-len", str(OUTPUT_TOKENS)),
        *("--num-prompts", str(requests), "--max-concurrency", str(cell.concurrency)),
        *("--num-warmups", str(min(cell.concurrency, requests)), "--temperature", "0", "--ignore-eos"),
        *("--percentile-metrics", "ttft,itl", "--metric-percentiles", "50,99", "--disable-tqdm"),
        *("--ready-check-timeout-sec", "0"),
    ])  # fmt: skip
    spoken = io.StringIO()
    with contextlib.redirect_stdout(spoken):
        found = asyncio.run(serve.main_async(arguments))
    if found["failed"]:
        raise RuntimeError(f"{found['failed']} of {requests} requests failed:\n{spoken.getvalue()[-2000:]}")
    return _told(found)


def _told(found: dict[str, Any]) -> Told:
    return Told(
        requests=found["completed"],
        failed=found["failed"],
        requests_per_s=found["request_throughput"],
        ttft_p50_ms=found["p50_ttft_ms"],
        ttft_p99_ms=found["p99_ttft_ms"],
        itl_p50_ms=found["p50_itl_ms"],
        itl_p99_ms=found["p99_itl_ms"],
    )


def _offer_whole() -> None:
    from vllm.benchmarks.lib import endpoint_request_func as known

    known.ASYNC_REQUEST_FUNCS[_WHOLE] = whole
    if _WHOLE not in known.OPENAI_COMPATIBLE_BACKENDS:
        known.OPENAI_COMPATIBLE_BACKENDS.append(_WHOLE)


async def whole(request_func_input: Any, session: Any, pbar: Any = None) -> Any:
    """vLLM's `RequestFunc` for an answer in one piece; its time to the first token is that of the whole answer."""
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput

    asked = request_func_input
    body = {
        "model": asked.model,
        "prompt": asked.prompt,
        "max_tokens": asked.output_len,
        "ignore_eos": asked.ignore_eos,
        **(asked.extra_body or {}),
    }
    output = RequestFuncOutput(prompt_len=asked.prompt_len)
    began = output.start_time = time.perf_counter()
    async with session.post(asked.api_url, json=body) as response:
        answer = await response.json()
    output.ttft = output.latency = time.perf_counter() - began
    output.success = response.status == 200
    if output.success:
        output.generated_text = answer["choices"][0]["text"]
        output.output_tokens = answer["usage"]["completion_tokens"]
    else:
        output.error = str(answer)
    return output
