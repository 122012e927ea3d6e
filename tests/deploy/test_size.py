"""What fits, compared with files that are really written, and with a vLLM that really runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from serve.capacity.size import (
    STORED,
    Shape,
    SizingRequest,
    adapter_bytes,
    cached_tokens,
    fit,
    slot_bytes,
    token_bytes,
    weight_bytes,
)
from serve.cli.app import app
from serve.cli.size import KNOWN
from tests.convert import parts
from tests.deploy.manifests import ROOT

GIB = 1 << 30


def stored_bytes(path: Path) -> int:
    """Bytes of all tensors of a safetensors file."""
    header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
    return path.stat().st_size - 8 - header_bytes


def padding(shape: Shape) -> int:
    """What vLLM adds to the embeddings of a file: 272 rows become 320."""
    return 48 * shape.hidden * 2 * (1 if shape.tied else 2)


def shape_in(directory: Path) -> Shape:
    return Shape.of(json.loads((directory / "config.json").read_text()))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_sixteen_bits_take_what_the_file_holds(tmp_path: Path, tied: bool) -> None:
    base = parts.save_base(tmp_path, tied=tied)

    shape = shape_in(base)
    assert weight_bytes(shape, STORED["bfloat16"]) == stored_bytes(base / "model.safetensors") + padding(shape)


def test_int8_takes_what_the_file_holds(tmp_path: Path) -> None:
    base = parts.save_base(tmp_path / "base", tied=True)
    directory = parts.save_compressed(base, tmp_path / "int8", "w8a8-int8")

    shape = shape_in(base)
    assert weight_bytes(shape, STORED["w8a8-int8"]) == stored_bytes(directory / "model.safetensors") + padding(shape)


def test_four_bits_take_what_the_file_holds(tmp_path: Path) -> None:
    base = parts.save_base(tmp_path / "base", tied=True)
    file = parts.save_quantized(base, tmp_path / "nf4", double=False) / "model.safetensors"
    with safe_open(file, "pt") as tensors:
        # The 16 levels that each layer brings along: the same for all, and no part of the arithmetic.
        names = [name for name in tensors.keys() if name.endswith((".quant_map", "bitsandbytes__nf4"))]  # noqa: SIM118
        levels = sum(tensors.get_tensor(name).nbytes for name in names)

    shape = shape_in(base)
    assert weight_bytes(shape, STORED["nf4"]) == stored_bytes(file) - levels + padding(shape)


def test_an_adapter_takes_what_its_file_holds(tmp_path: Path) -> None:
    base = parts.save_base(tmp_path / "base", tied=True)
    adapter = parts.save_adapter(base, tmp_path / "adapter", r=8, target_modules=parts.LINEARS)

    with safe_open(adapter / "adapter_model.safetensors", "pt") as tensors:
        values = sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118
    assert adapter_bytes(shape_in(base), 8) == 2 * values


def test_known_models_have_as_many_weights_as_their_cards_say() -> None:
    millions = {name: round(weight_bytes(shape, STORED["bfloat16"]) / 2e6) for name, shape in KNOWN.items()}

    assert millions == {"llama-3.2-1b": 1236, "llama-3.2-3b": 3213, "llama-3.1-8b": 8030, "llama-3.3-70b": 70554}


def test_a_cache_holds_whole_blocks() -> None:
    assert cached_tokens(cache_bytes=100 * 16 * 10 - 1, bytes_of_token=10) == 99 * 16


def test_more_memory_adapters_and_gpus_move_it_the_right_way() -> None:
    shape = KNOWN["llama-3.2-3b"]

    def tokens(**changes: Any) -> int:
        return fit(shape, SizingRequest(**{"memory_bytes": 24 * GIB, "stored": "nf4", **changes})).tokens

    assert tokens(memory_bytes=48 * GIB) > 2 * tokens()
    assert tokens(slots=64) < tokens() < tokens(max_rank=0)
    assert tokens(gpus=2) > 2 * tokens()
    assert tokens(kv_value_bytes=1) == pytest.approx(2 * tokens(), rel=0.001)
    assert tokens(gpus=16) == pytest.approx(tokens(gpus=8), rel=0.15)  # eight heads: sixteen GPUs repeat them


def test_what_does_not_fit_is_said() -> None:
    result = CliRunner().invoke(app, ["size", "llama-3.3-70b", "--gpu", "l4"])

    assert result.exit_code == 0
    assert result.output.count("none") == len(STORED)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nowhere"], "neither the directory of a model"), (["llama-3.2-3b", "--gpu", "big"], "no GPU that is known")],
    ids=["no model", "no GPU"],
)
def test_a_mistake_is_reported(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["size", *arguments])

    assert result.exit_code == 1
    assert message in " ".join(result.output.split())


def test_another_architecture_is_reported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "rwkv"}')

    result = CliRunner().invoke(app, ["size", str(tmp_path)])

    assert result.exit_code == 1
    assert "error[state_invalid]" in result.output


def test_the_page_on_capacity_quotes_the_command() -> None:
    """Every row of its table, as the command says it."""
    rows = re.findall(
        r"^\| (\S+) \| (\S+) \| (\d+) \| ([\d,]+) \| ([\d.]+) \|$",
        (ROOT / "docs" / "reference" / "capacity.md").read_text(),
        re.MULTILINE,
    )
    assert len(rows) >= 9
    for gpu, stored, gpus, tokens, sequences in rows:
        arguments = ["size", "llama-3.2-3b", "--gpu", gpu, "--gpus", gpus, "--json"]
        capacity = json.loads(CliRunner().invoke(app, arguments).output)["stored"][stored]
        assert (f"{capacity['tokens']:,}", f"{capacity['sequences']:.1f}") == (tokens, sequences), gpu


@pytest.mark.engine
@pytest.mark.parametrize("stored", ["bfloat16", "nf4"])
def test_vllm_makes_of_a_model_what_was_foretold(tmp_path: Path, stored: str) -> None:
    base = parts.save_base(tmp_path / "base", tied=True, hidden=128)
    served = base if stored == "bfloat16" else parts.save_quantized(base, tmp_path / "nf4")
    cache_bytes, max_rank, slots = (64 << 20) + 12345, 16, 3

    measured = measured_by_vllm(served, cache_bytes, max_rank, slots)

    shape = shape_in(base)
    assert measured["slot_bytes"] == slot_bytes(shape, max_rank)
    assert measured["cached_tokens"] == cached_tokens(cache_bytes, token_bytes(shape), measured["block_tokens"])
    if stored == "bfloat16":
        assert measured["weight_bytes"] == weight_bytes(shape, STORED[stored])


def measured_by_vllm(model: Path, *numbers: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.deploy.vllm_memory", str(model), *map(str, numbers)]
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, cwd=ROOT, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stderr[-3000:]
    measured: dict[str, Any] = json.loads(result.stdout.rpartition("TOLD ")[2])
    return measured
