"""GPTQ and AWQ by the real llm-compressor, in its own packages, on a tiny model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from convert.errors import FormatRefused, QuantizerFailed, QuantizerMissing
from convert.inputs.base_model import BaseModel
from convert.progress import silent
from convert.quantization.compressed import Compressed
from convert.quantization.llmcompressor import PACKAGES, CalibratedName, Method, quantize_calibrated, rows_digest
from tests.convert import families, parts

FORMS: list[tuple[Method, CalibratedName]] = [("gptq", "w4a16"), ("gptq", "w8a8-int8"), ("awq", "w4a16")]
ROWS = [[1, *range(3 + row, 180, 7 + row)] for row in range(6)]


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parts.save_base(tmp_path_factory.mktemp("calibrated") / "merged", tied=True, dtype="float32")


@pytest.fixture(scope="module")
def quantized(merged: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Method, CalibratedName], Path]:
    home = tmp_path_factory.mktemp("quantized")
    directories = {}
    for method, scheme in FORMS:
        directories[method, scheme] = home / f"{method}-{scheme}"
        identity = quantize_calibrated(merged, directories[method, scheme], method, scheme, ROWS, silent)
        (home / f"{method}-{scheme}.identity").write_text(identity)
    return directories


@pytest.mark.parametrize("variant", [("gptq", "w8a8-int8"), ("awq", "w4a16")], ids="-".join)
def test_fused_layers_are_quantized_as_one(tmp_path: Path, variant: tuple[Method, CalibratedName]) -> None:
    model = families.random_model("phi3", layers=2)
    model.save_pretrained(tmp_path / "merged")
    parts.save_tokenizer(tmp_path / "merged")

    quantize_calibrated(tmp_path / "merged", tmp_path / "quantized", *variant, ROWS, silent)

    opened = BaseModel.open(tmp_path / "quantized")
    assert opened.quantization_format == Compressed.fitting(variant[1], [64, 128])
    assert all(linear.quantization_format or linear.is_head for linear in opened.linears.values())
    rounded = parts.logits(parts.float32_of(opened))
    loss = parts.divergence(parts.logits(model), rounded)
    assert 0 < loss < (0.001 if variant[1] == "w8a8-int8" else 0.1)


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """A destination that a refusal leaves absent."""
    yield tmp_path / "out"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("variant", FORMS, ids="-".join)
def test_its_output_is_read_like_our_own(
    quantized: dict[tuple[Method, CalibratedName], Path], variant: tuple[Method, CalibratedName]
) -> None:
    directory = quantized[variant]
    opened = BaseModel.open(directory)

    assert opened.quantization_format == Compressed.fitting(variant[1], [64, 128])
    assert {spec.dtype for spec in opened.other_specs} == {"BF16"}
    assert sorted(path.name for path in directory.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("variant", FORMS, ids="-".join)
def test_the_configuration_is_the_one_we_write(
    quantized: dict[tuple[Method, CalibratedName], Path], variant: tuple[Method, CalibratedName]
) -> None:
    """Ours says what llm-compressor says, but for its version and the order GPTQ takes the columns in."""
    by_library = json.loads((quantized[variant] / "config.json").read_text())["quantization_config"]
    by_graft = Compressed.fitting(variant[1], [64, 128]).config()

    assert by_library.pop("version") != by_graft.pop("version")
    if variant[0] == "gptq":
        assert by_library["config_groups"]["group_0"]["weights"].pop("actorder") == "static"
        by_graft["config_groups"]["group_0"]["weights"].pop("actorder")
    assert by_library == by_graft


@pytest.mark.parametrize("variant", FORMS, ids="-".join)
def test_the_result_is_near_the_model_it_was_made_from(
    merged: Path, quantized: dict[tuple[Method, CalibratedName], Path], variant: tuple[Method, CalibratedName]
) -> None:
    expected = parts.logits(parts.load_float32(merged))
    quantized_logits = parts.logits(
        AutoModelForCausalLM.from_pretrained(quantized[variant], dtype=torch.float32).eval()
    )

    assert parts.divergence(expected, quantized_logits) < (0.01 if variant[1] == "w8a8-int8" else 0.2)


def test_calibration_beats_rounding_on_the_calibration_rows(
    merged: Path, quantized: dict[tuple[Method, CalibratedName], Path], tmp_path: Path
) -> None:
    rounded = parts.save_compressed(merged, tmp_path / "rtn", "w4a16")
    original = parts.load_float32(merged)

    def loss(directory: Path) -> float:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        prompts = [torch.tensor([row]) for row in ROWS]
        return sum(parts.divergence(parts.logits(original, prompt), parts.logits(model, prompt)) for prompt in prompts)

    assert loss(quantized["gptq", "w4a16"]) < loss(rounded)


def test_the_identity_names_library_method_and_rows(
    quantized: dict[tuple[Method, CalibratedName], Path],
) -> None:
    identity = Path(f"{quantized['gptq', 'w4a16']}.identity").read_text()

    assert identity == (
        f"llm-compressor 0.14.0.1, gptq w4a16 in groups of 64, calibrated on 6 rows {rows_digest(ROWS)}"
    )


def test_the_digest_is_that_of_sha256sum_on_the_rows() -> None:
    """`printf '1 2\\n30\\n' | sha256sum`"""
    assert rows_digest([[1, 2], [30]]) == "sha256:b438ae054749a49cdbbf266911b749edae298cbab1e4445ef7fed1fab6220f8d"
    assert rows_digest([[1, 2], [30]]) != rows_digest([[1], [2, 30]]) != rows_digest([[12], [30]])


def test_the_same_rows_give_the_same_bytes_and_progress_is_reported(
    merged: Path, quantized: dict[tuple[Method, CalibratedName], Path], tmp_path: Path
) -> None:
    steps: list[tuple[str, int, int]] = []

    quantize_calibrated(merged, tmp_path / "again", "gptq", "w4a16", ROWS, lambda *step: steps.append(step))

    for file in sorted(path.name for path in quantized["gptq", "w4a16"].iterdir()):
        assert (tmp_path / "again" / file).read_bytes() == (quantized["gptq", "w4a16"] / file).read_bytes(), file
    assert steps[0] == ("calibrating layers", 1, 2)
    assert steps[-1] == ("calibrating layers", 2, 2)


def test_without_its_packages_it_says_how_to_install_them(merged: Path, out: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizerMissing, match=r"create\.py --with quantizers"):
        quantize_calibrated(merged, out, "gptq", "w4a16", ROWS, silent, packages=tmp_path / "nowhere")


def test_a_broken_library_is_an_error_with_its_own_message(merged: Path, out: Path, tmp_path: Path) -> None:
    package = tmp_path / "packages" / "llmcompressor"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('the disk is on fire')")

    with pytest.raises(QuantizerFailed, match="the disk is on fire"):
        quantize_calibrated(merged, out, "gptq", "w4a16", ROWS, silent, packages=package.parent)


def test_a_library_that_is_killed_is_an_error(merged: Path, out: Path, tmp_path: Path) -> None:
    package = tmp_path / "packages" / "llmcompressor"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")

    with pytest.raises(QuantizerFailed, match="lack of memory"):
        quantize_calibrated(merged, out, "gptq", "w4a16", ROWS, silent, packages=package.parent)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "nothing to calibrate on"),
        ([[1], []], "nothing to calibrate on"),
        ([[1, 272]], "outside"),
        ([[-1]], "outside"),
    ],
)
def test_rows_that_can_not_be_used_are_refused_before_the_library_starts(
    merged: Path, out: Path, rows: list[list[int]], says: str
) -> None:
    with pytest.raises(QuantizerFailed, match=says):
        quantize_calibrated(merged, out, "gptq", "w4a16", rows, silent)


def test_a_width_that_no_group_divides_is_refused(tmp_path: Path, out: Path) -> None:
    odd = parts.save_base(tmp_path / "odd", tied=True, hidden=40)

    with pytest.raises(FormatRefused, match="input width 40, 80"):
        quantize_calibrated(odd, out, "gptq", "w4a16", ROWS, silent)


def test_awq_in_eight_bits_is_refused(merged: Path, out: Path) -> None:
    with pytest.raises(FormatRefused, match="AWQ is for w4a16"):
        quantize_calibrated(merged, out, "awq", "w8a8-int8", ROWS, silent)


def test_a_quantized_model_is_refused(nf4_base: Path, out: Path) -> None:
    with pytest.raises(QuantizerFailed, match="quantized already"):
        quantize_calibrated(nf4_base, out, "gptq", "w4a16", ROWS, silent)


def test_the_packages_are_only_seen_by_the_process_that_needs_them() -> None:
    import transformers

    assert not Path(transformers.__file__).is_relative_to(PACKAGES)
    assert str(PACKAGES) not in os.environ.get("PYTHONPATH", "")
