"""What vLLM does with each format on this machine, compared with the table that plans are made from.

Every engine is vLLM's own API server, as a user starts it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from convert.artifact import QuantizationName
from convert.base_model import BaseModel
from convert.compressed import Compressed
from convert.targets import Support, support, target_here
from examples.server import start, stop
from serve.ports import free_port
from tests.convert import parts

PROMPT = [0, 17, 99, 140, 3, 250, 61, 8, 200, 33, 77, 5]
BASE, ADAPTED = "base", "adapted"
START_S = 180
ADAPTER_OPTIONS = ("--enable-lora", "--max-lora-rank", "8", "--lora-modules")
# Mean difference of log-probabilities over the five best tokens of every position. The engine computes in bfloat16, the
# reference in float32; where activations are rounded to 8 bits as well, such differences move some of them to the next
# code, which is far away in float8.
TOLERANCE_NATS = {"none": 0.05, "nf4-double": 0.05, "w8a8-int8": 0.1, "fp8-dynamic": 0.2, "w4a16": 0.05}
# The adapter's reference doesn't round activations.
ADAPTED_TOLERANCE_NATS = TOLERANCE_NATS | {"fp8-dynamic": 0.3}

TRIED: tuple[QuantizationName, ...] = ("none", "nf4-double", "w8a8-int8", "fp8-dynamic", "w4a16")


@dataclass(frozen=True)
class Models:
    base: Path
    adapter: Path
    stored: dict[QuantizationName, Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    home = tmp_path_factory.mktemp("formats")
    base = parts.save_base(home / "base", tied=True, hidden=128, layers=1)
    stored: dict[QuantizationName, Path] = {"none": base, "nf4-double": parts.save_quantized(base, home / "nf4")}
    for name in ("w8a8-int8", "fp8-dynamic", "w4a16"):
        stored[name] = parts.save_compressed(base, home / name, name)
    return Models(base, parts.save_adapter(base, home / "adapter"), stored)


@dataclass(frozen=True)
class Engine:
    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def is_up(self) -> bool:
        """Wait until it answers, or has ended."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health", timeout=2).is_success:
                    return True
            except httpx.TransportError:
                time.sleep(0.2)
        assert self.process.poll() is not None, (
            f"neither up nor ended after {START_S} s: {self.log.read_text()[-3000:]}"
        )
        return False

    def ask(self, model: str) -> httpx.Response:
        body: dict[str, Any] = {"model": model, "prompt": PROMPT, "max_tokens": 1, "temperature": 0}
        return httpx.post(f"{self.url}/v1/completions", json=body | {"prompt_logprobs": 5}, timeout=120)

    def logprobs(self, model: str) -> list[dict[int, float]]:
        """For every position of the prompt but the last: the best next tokens, by id."""
        response = self.ask(model)
        assert response.is_success, f"{response.text}\n{self.log.read_text()[-3000:]}"
        positions = response.json()["choices"][0]["prompt_logprobs"][1:]
        return [{int(token): found["logprob"] for token, found in position.items()} for position in positions]


@contextmanager
def engine(model: Path, log: Path, *options: str) -> Iterator[Engine]:
    port = free_port()
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
        *("--served-model-name", BASE, "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"),
        *("--max-model-len", "256", "--kv-cache-memory-bytes", str(64 << 20), *options),
    ]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    with log.open("wb") as output:
        process = start(command, output, environment)
        try:
            yield Engine(process, f"http://127.0.0.1:{port}", log)
        finally:
            stop(process, timeout_s=20)


class SaturatingInt8(torch.nn.Module):
    """oneDNN's int8 product on a CPU without VNNI, exactly: two products are added in 16 bits, which can overflow."""

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__()
        self.codes, self.scale = codes.int(), scale.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        token_scale = x.abs().amax(-1, keepdim=True) / 127
        shifted = (x / token_scale).round().clamp(-128, 127).int() + 128
        products = shifted.unsqueeze(-2) * self.codes
        pairs = products.unflatten(-1, (-1, 2)).sum(-1).clamp(-(1 << 15), (1 << 15) - 1)
        return (pairs.sum(-1) - 128 * self.codes.sum(-1)) * token_scale * self.scale.T


def reference(name: QuantizationName, directory: Path) -> torch.Tensor:
    """Log-probabilities (position, vocabulary) of the stored weights in float32, with the format's rounding of
    activations, by the library that defines it, or as this CPU does it."""
    opened = BaseModel.open(directory)
    if not isinstance(opened.settings, Compressed):
        return logprobs_of(parts.float32_of(opened))
    if name != "w8a8-int8" or not saturates_here():
        return logprobs_of(parts.load_float32(directory))
    model = parts.float32_of(opened)
    for module, linear in opened.linears.items():
        stored = {spec.name: opened.tensors.read(spec.name) for spec in opened.stored(linear)}
        kernel = SaturatingInt8(stored[f"{module}.weight"], stored[f"{module}.weight_scale"])
        parent, _, child = module.rpartition(".")
        setattr(model.get_submodule(parent), child, kernel)
    return logprobs_of(model)


def adapted_reference(models: Models, name: QuantizationName) -> torch.Tensor:
    """The adapter by peft on the stored weights in float32; activations are not rounded."""
    return logprobs_of(parts.with_adapter(parts.float32_of(BaseModel.open(models.stored[name])), models.adapter))


def logprobs_of(model: Any) -> torch.Tensor:
    return parts.logits(model, torch.tensor([PROMPT])).log_softmax(-1)[:-1]


def saturates_here() -> bool:
    flags = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    return target_here().startswith("cpu") and not flags & {"avx_vnni", "avx512_vnni"}


def difference(found: list[dict[int, float]], expected: torch.Tensor) -> float:
    """Mean absolute difference in nats."""
    assert len(found) == len(expected)
    each = [abs(value - float(row[token])) for position, row in zip(found, expected, strict=True)
            for token, value in position.items()]  # fmt: skip
    assert len(each) >= 5 * len(expected)
    return sum(each) / len(each)


def expected_here(name: QuantizationName) -> Support:
    return support(target_here(), name)


@pytest.mark.parametrize("name", TRIED)
def test_vllm_does_with_a_format_what_the_table_says(models: Models, tmp_path: Path, name: QuantizationName) -> None:
    table, stored = expected_here(name), models.stored[name]
    adapter = (*ADAPTER_OPTIONS, f"{ADAPTED}={models.adapter}") if table.with_adapter else ()

    with engine(stored, tmp_path / "log", *adapter) as served:
        assert served.is_up() == table.loads, served.log.read_text()[-3000:]
        if not table.loads:
            return
        if not table.generates:
            assert not served.ask(BASE).is_success
            return
        found = difference(served.logprobs(BASE), reference(name, stored))
        print("DIFF", name, found)
        assert found < TOLERANCE_NATS[name]
        if table.with_adapter:
            answers, expected = served.logprobs(ADAPTED), adapted_reference(models, name)
            print("ADAPT", name, difference(answers, expected), difference(answers, reference(name, stored)))
            assert difference(answers, expected) < ADAPTED_TOLERANCE_NATS[name]
            assert difference(answers, reference(name, stored)) > 2 * ADAPTED_TOLERANCE_NATS[name]


def test_vllm_stops_under_an_adapter_where_the_table_says_so(models: Models, tmp_path: Path) -> None:
    table = expected_here("w8a8-int8")
    if table.with_adapter or table.evidence != "seen":
        pytest.skip(f"{target_here()}: nothing was seen to stop")

    with engine(
        models.stored["w8a8-int8"], tmp_path / "log", *ADAPTER_OPTIONS, f"{ADAPTED}={models.adapter}"
    ) as served:
        assert not served.is_up()
