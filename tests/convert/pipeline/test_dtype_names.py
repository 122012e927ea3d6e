"""config.json of every result names the type of its weights as old and as new readers look for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from convert.pipeline.convert import Destination, convert
from convert.pipeline.request import Method, Request
from convert.quality import Gate
from convert.quantization.llmcompressor import PACKAGES
from convert.routes.choose import RouteOptions
from convert.routes.variants import QuantizeOption, RouteOption
from tests.convert import parts

ROWS = "".join(f'{{"text": "the rain in spain stays mainly in the plain, {number} times"}}\n' for number in range(12))


def config_of(
    checkpoint: Path,
    base: Path,
    out: Path,
    route: RouteOption,
    quantize: QuantizeOption,
    method: Method = "rtn",
    calibration: Path | None = None,
) -> dict[str, object]:
    request = Request(
        checkpoint, base, RouteOptions(route, quantize), target="cuda:9.0", steps=1, method=method,
        calibration=calibration, gate=Gate(), measure=False,
    )  # fmt: skip
    convert(request, Destination(out, "tiny"))
    config: dict[str, object] = json.loads((out / "model" / "config.json").read_text())
    assert AutoConfig.from_pretrained(out / "model").dtype == torch.bfloat16
    return config


@pytest.mark.parametrize("quantize", ["none", "nf4", "w8a8-int8", "fp8-dynamic", "w4a16"])
def test_a_merged_model(lora: Path, base: Path, out: Path, quantize: QuantizeOption) -> None:
    config = config_of(lora, base, out, "merge", quantize)

    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(("route", "quantize"), [("adapter", "none"), ("adapter", "nf4"), ("rebase", "nf4")])
@pytest.mark.parametrize("stated", [{}, {"dtype": ...}, {"dtype": ..., "torch_dtype": "bfloat16"}], ids=str)
def test_the_base_of_a_separate_adapter(
    lora: Path,
    base: Path,
    tmp_path: Path,
    out: Path,
    route: RouteOption,
    quantize: QuantizeOption,
    stated: dict[str, str],
) -> None:
    copied = parts.copy(base, tmp_path / "base")
    parts.edit_json(copied / "config.json", **stated)

    config = config_of(lora, copied, out, route, quantize)

    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


def test_a_recovered_model(qlora: Path, base: Path, tmp_path: Path, out: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(ROWS)

    config = config_of(qlora, base, out, "recover", "none", calibration=tmp_path / "rows.jsonl")

    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


@pytest.mark.skipif(not (PACKAGES / "llmcompressor").is_dir(), reason="the packages of llm-compressor are not there")
@pytest.mark.parametrize(("method", "quantize"), [("gptq", "w4a16"), ("gptq", "w8a8-int8"), ("awq", "w4a16")])
def test_a_calibrated_model(
    lora: Path, base: Path, tmp_path: Path, out: Path, method: Method, quantize: QuantizeOption
) -> None:
    (tmp_path / "rows.jsonl").write_text(ROWS)

    config = config_of(lora, base, out, "merge", quantize, method, tmp_path / "rows.jsonl")

    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
