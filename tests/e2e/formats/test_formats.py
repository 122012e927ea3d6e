"""What vLLM does with each format on this machine, compared with the table that plans are made from.

Every engine is vLLM's own API server, as a user starts it. A row of the table that was seen on this kind of machine
must hold. A row that nobody has seen yet is only reported: the reason of the skipped test says what this machine did,
for whoever adds it to the table.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
import torch

from convert.artifact import QuantizationName
from convert.inputs.base_model import BaseModel
from convert.quantization.compressed import Compressed
from convert.quantization.targets import QUANTIZATIONS, Support, support, target_here
from examples.server import start, stop
from serve.deployment.ports import free_port
from tests.convert import parts

PROMPT = [0, 17, 99, 140, 3, 250, 61, 8, 200, 33, 77, 5]
BASE, ADAPTED = "base", "adapted"
START_S = 600
_ERROR = re.compile(r"\b[A-Z]\w*(Error|Exception)\b: ")
ADAPTER_OPTIONS = ("--enable-lora", "--max-lora-rank", "8", "--lora-modules")
# Mean difference of log-probabilities over the five best tokens of every position. The engine computes in bfloat16, the
# reference in float32; where activations are rounded to 8 bits as well, such differences move some of them to the next
# code, which is far away in float8.
TOLERANCE_NATS = {
    "none": 0.05,
    "nf4": 0.05,
    "nf4-double": 0.05,
    "w8a8-int8": 0.1,
    "fp8-dynamic": 0.2,
    "w4a16": 0.05,
}
# The adapter's reference doesn't round activations.
ADAPTED_TOLERANCE_NATS = TOLERANCE_NATS | {"fp8-dynamic": 0.3}

Answers = Literal["stops", "wrong", "right"]


@dataclass(frozen=True)
class Models:
    base: Path
    adapter: Path
    stored: dict[QuantizationName, Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    home = tmp_path_factory.mktemp("formats")
    base = parts.save_base(home / "base", tied=True, hidden=128, layers=1)
    stored: dict[QuantizationName, Path] = {
        "none": base,
        "nf4": parts.save_quantized(base, home / "nf4", double=False),
        "nf4-double": parts.save_quantized(base, home / "nf4-double"),
    }
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

    def first_error(self) -> str:
        """The cause: the errors after it only say that something failed before them."""
        lines = self.log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if _ERROR.search(line) and " WARNING " not in line]
        return errors[0].strip()[-300:] if errors else "no error in the log"

    def logprobs(self, model: str) -> list[dict[int, float]] | None:
        """For every position of the prompt but the last: the best next tokens, by id. None where it doesn't answer."""
        body: dict[str, Any] = {"model": model, "prompt": PROMPT, "max_tokens": 1, "temperature": 0}
        try:
            response = httpx.post(f"{self.url}/v1/completions", json=body | {"prompt_logprobs": 5}, timeout=120)
        except httpx.TransportError:
            return None
        if not response.is_success:
            return None
        positions = response.json()["choices"][0]["prompt_logprobs"][1:]
        return [{int(token): log_prob["logprob"] for token, log_prob in position.items()} for position in positions]


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
    if not isinstance(opened.quantization_format, Compressed):
        return logprobs_of(parts.float32_of(opened))
    if name != "w8a8-int8" or not saturates_here():
        return logprobs_of(parts.load_float32(directory))
    model = parts.float32_of(opened)
    for module, linear in opened.linears.items():
        stored = {spec.name: opened.tensors.read(spec.name) for spec in opened.stored_specs(linear)}
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


def difference(actual: list[dict[int, float]], expected: torch.Tensor) -> float:
    """Mean absolute difference in nats."""
    assert len(actual) == len(expected)
    differences = [abs(value - float(row[token])) for position, row in zip(actual, expected, strict=True)
            for token, value in position.items()]  # fmt: skip
    assert len(differences) >= 5 * len(expected)
    return sum(differences) / len(differences)


@dataclass
class Observation:
    """What vLLM did with a format here. `notes`: differences of the answers in nats, and how an engine stopped."""

    loads: bool
    base: Answers = "stops"
    adapted: Answers = "stops"
    notes: list[str] = field(default_factory=list)

    def agrees_with(self, table: Support) -> bool:
        expected = ("right" if table.generates else "stops", "right" if table.with_adapter else "stops")
        return (self.loads, self.base, self.adapted) == (table.loads, *expected)


def observe(models: Models, name: QuantizationName, directory: Path) -> Observation:
    """Starts the engine with an adapter, and once more without one where it stops while it loads."""
    adapter = (*ADAPTER_OPTIONS, f"{ADAPTED}={models.adapter}")
    with engine(models.stored[name], directory / "adapter.log", *adapter) as server:
        if server.is_up():
            base, note = observe_base(server, models, name)
            observation = Observation(True, base, notes=[note])
            if base != "stops":
                observation.adapted, note = observe_adapted(server, models, name)
                observation.notes.append(note)
            return observation
        notes = [f"with an adapter: {server.first_error()}"]
    with engine(models.stored[name], directory / "base.log") as server:
        if not server.is_up():
            return Observation(False, notes=[*notes, f"without: {server.first_error()}"])
        base, note = observe_base(server, models, name)
        return Observation(True, base, notes=[*notes, note])


def observe_base(server: Engine, models: Models, name: QuantizationName) -> tuple[Answers, str]:
    answers = server.logprobs(BASE)
    if answers is None:
        return "stops", server.first_error()
    error = difference(answers, reference(name, models.stored[name]))
    return "right" if error < TOLERANCE_NATS[name] else "wrong", f"base: {error:.3f} nats"


def observe_adapted(server: Engine, models: Models, name: QuantizationName) -> tuple[Answers, str]:
    """The adapter must change the answers by more than the tolerance, or an ignored adapter would pass."""
    answers = server.logprobs(ADAPTED)
    if answers is None:
        return "stops", server.first_error()
    error = difference(answers, adapted_reference(models, name))
    effect = difference(answers, reference(name, models.stored[name]))
    tolerance = ADAPTED_TOLERANCE_NATS[name]
    is_right = error < tolerance and effect > 2 * tolerance
    return "right" if is_right else "wrong", f"adapter: {error:.3f} nats, {effect:.3f} from the base"


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_vllm_does_with_a_format_what_the_table_says(models: Models, tmp_path: Path, name: QuantizationName) -> None:
    target, table = target_here(), support(target_here(), name)

    observation = observe(models, name, tmp_path)

    print(target, name, observation)
    if table.evidence != "seen":
        verdict = "as" if observation.agrees_with(table) else "not as"
        pytest.skip(f"{name} was not seen on {target} before. Now, {verdict} the table expects: {observation}")
    assert observation.agrees_with(table), f"{target}: {observation}; the table says {table}"
