"""Whole conversions by the routes and options that build on several parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from convert.artifact import GOLDEN, Artifact, file_sha256
from convert.detection.detect import detect
from convert.detection.training import Training
from convert.errors import CheckpointUnsupported, FormatRefused, QualityGateFailed, RouteRefused
from convert.inputs.adapter_checkpoint import Checkpoint
from convert.verification.verify import golden_of
from tests.convert import parts
from tests.convert.asking import Request, convert
from tests.convert.cli.test_cli import invoke

SENTENCES = (
    "the rain in spain stays mainly in the plain",
    "a plain train in the rain",
    "spain has plains and trains",
    "mainly rain, hardly a train",
    "in the plain stays the rain of spain",
    "trains stay in spain in the rain",
    "no rain stays in the plain",
    "the main train of spain",
    "plainly the rain stays",
    "hail in spain, rain in the plain",
    "the stain stays on the train",
    "a grain of rain in spain",
)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES))
    return path


def run(checkpoint: Path, base: Path, out: Path, **settings: Any) -> Artifact:
    return convert(Request(checkpoint, base, out, **settings))


def test_an_adapter_rebased_onto_the_original_weights_loses_less_there_than_as_it_is(
    qlora: Path, base: Path, out: Path, calibration: Path
) -> None:
    artifact = run(qlora, base, out, route="rebase", calibration=calibration)

    trained = parts.logits(parts.with_adapter(parts.dequantized_model(base), qlora))
    as_it_is = parts.logits(parts.with_adapter(parts.load_float32(base), qlora))
    rebased = parts.logits(PeftModel.from_pretrained(parts.load_float32(out / "model"), str(out / "adapter")).eval())
    assert parts.divergence(trained, rebased) < 0.2 * parts.divergence(trained, as_it_is)
    assert artifact.manifest.model.quantization == "none"
    assert artifact.manifest.adapter
    assert artifact.manifest.adapter.rank == 64
    written, original = load_file(out / "model" / "model.safetensors"), load_file(base / "model.safetensors")
    assert all(torch.equal(written[name], weight) for name, weight in original.items())


def test_a_recovered_adapter_is_merged_and_can_be_trained_on(
    qlora: Path, base: Path, out: Path, calibration: Path
) -> None:
    artifact = run(qlora, base, out, route="recover", steps=2, calibration=calibration)

    recovery = artifact.manifest.recovery
    assert recovery
    assert recovery.kl_recovered <= recovery.kl_naive
    recovered = Checkpoint.open(out / "checkpoint")
    assert detect(recovered).training is Training.LORA
    assert artifact.manifest.checkpoint
    merged = parts.logits(parts.load_float32(out / "model"))
    separate = parts.logits(parts.with_adapter(parts.load_float32(base), out / "checkpoint"))
    assert parts.divergence(separate, merged) < 1e-3
    artifact.verify()


def test_recovering_needs_text_to_distil_on(qlora: Path, base: Path, out: Path) -> None:
    with pytest.raises(RouteRefused, match="--calibration"):
        run(qlora, base, out, route="recover")


def test_what_is_calibrated_on_is_not_measured_on(qlora: Path, base: Path, out: Path, calibration: Path) -> None:
    with pytest.raises(QualityGateFailed, match="12 rows of --calibration are also in the text"):
        run(qlora, base, out, route="rebase", calibration=calibration, text=calibration)


def test_dora_has_no_low_rank_way(base: Path, tmp_path: Path, out: Path, calibration: Path) -> None:
    dora = parts.mark_qlora(parts.save_adapter(base, tmp_path / "dora", use_dora=True))

    with pytest.raises(CheckpointUnsupported):
        run(dora, base, out, route="rebase", calibration=calibration)


def test_the_target_decides_what_can_be_made(qlora: Path, base: Path, out: Path) -> None:
    exact: dict[str, Any] = {"route": "merge", "quantize": "w4a16", "measure": False}
    with pytest.raises(FormatRefused, match="needs AVX-512"):
        run(qlora, base, out, **exact)

    assert run(qlora, base, out, **exact, target="cuda:8.0").manifest.model.quantization == "w4a16"


def test_a_rank_that_does_not_fit_is_refused_before_the_first_byte(
    qlora: Path, base: Path, tmp_path: Path, out: Path, calibration: Path
) -> None:
    steps: list[str] = []
    request = Request(qlora, base, out, route="rebase", calibration=calibration, rank=65)

    with pytest.raises(RouteRefused, match="Rank 65 does not fit this adapter of rank 8: choose one of 8, 16"):
        convert(request, lambda step, done, total: steps.append(step))

    assert steps == []


def test_a_format_that_the_target_serves_wrongly_at_these_widths_is_refused_or_passed_over(
    tmp_path: Path, out: Path
) -> None:
    base = parts.save_base(tmp_path / "base", tied=True, hidden=96)
    adapter = parts.save_adapter(base, tmp_path / "adapter")
    qlora, lora = (mark(parts.copy(adapter, tmp_path / mark.__name__)) for mark in (parts.mark_qlora, parts.mark_lora))
    settings: dict[str, Any] = {"measure": False, "target": "cpu:avx512-vnni"}

    with pytest.raises(FormatRefused, match=r"multiples of 64: .*; here a layer has 96 inputs and 48 outputs"):
        run(qlora, base, tmp_path / "refused", route="adapter", **settings)
    with pytest.raises(FormatRefused, match="multiples of 64"):
        run(lora, base, tmp_path / "refused", route="merge", quantize="nf4", **settings)
    artifact = run(lora, base, out, route="merge", target="cpu:avx512")

    assert artifact.manifest.model.quantization == "none"
    assert artifact.manifest.trials == ()


@pytest.mark.parametrize("quantize", ["w8a8-int8", "fp8-dynamic"])
def test_eight_bits_lose_less_than_the_original_weights_in_four(
    qlora: Path, base: Path, tmp_path: Path, quantize: Any
) -> None:
    eight = run(qlora, base, tmp_path / "eight", route="merge", quantize=quantize).manifest.quality
    four = run(qlora, base, tmp_path / "four", route="merge", quantize="nf4", onto="original").manifest.quality

    assert eight
    assert four
    assert eight.kl_mean < four.kl_mean
    assert eight.retention
    assert eight.retention.mean > 0.9


def test_golden_answers_are_those_of_the_files(qlora: Path, base: Path, out: Path) -> None:
    artifact = run(qlora, base, out)

    assert artifact.manifest.golden == file_sha256(out / GOLDEN)
    golden = golden_of(artifact)
    assert len(golden.prompts) >= 32
    prompt = golden.prompts[0]
    result = PeftModel.from_pretrained(parts.load_stored(out / "model"), str(out / "adapter")).eval()
    ids = torch.tensor([prompt.token_ids])
    logprobs = parts.logits(result, ids).log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    assert torch.allclose(logprobs, torch.tensor(prompt.result), atol=1e-4)
    assert prompt.base != prompt.result


def test_a_canary_that_the_model_as_trained_fails_is_said_to_be_its_own_failure(
    qlora: Path, base: Path, tmp_path: Path, out: Path
) -> None:
    canaries = tmp_path / "canaries.jsonl"
    question = {"messages": [{"role": "user", "content": "the rain"}], "expect": "never said by anybody"}
    canaries.write_text(json.dumps(question))

    says = r"as trained, before any conversion, fails 1 of 1 canaries itself(.|\n)*'never said by anybody' is not in: "
    with pytest.raises(QualityGateFailed, match=says) as refusal:
        run(qlora, base, out, canaries=canaries)
    assert "loses less" not in str(refusal.value)


def test_the_manifest_names_every_file_of_the_base(qlora: Path, base: Path, out: Path) -> None:
    lineage = run(qlora, base, out, measure=False).manifest.base

    assert lineage
    assert lineage.files == {name: file_sha256(base / name) for name in ("config.json", "model.safetensors")}


def test_plan_lists_exactly_the_tensors_that_run_writes(qlora: Path, base: Path, out: Path) -> None:
    arguments = ["--route", "merge", "--quantize", "w8a8-int8", "--target", "cpu"]
    result = invoke("plan", qlora, "--base", base, *arguments, "--json")
    assert not out.exists()
    (way,) = json.loads(result.stdout)["ways"]

    run(qlora, base, out, route="merge", quantize="w8a8-int8", measure=False)

    from safetensors import safe_open

    with safe_open(out / "model" / "model.safetensors", "pt") as file:
        written = {name: (file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert {tensor["name"]: (tensor["dtype"], tensor["shape"]) for tensor in way["tensors"]} == written
    assert way["estimate"]["output_bytes"] == sum(
        path.stat().st_size for path in (out / "model").glob("*.safetensors")
    ) - _header_bytes(out / "model" / "model.safetensors")


def _header_bytes(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_compare_draws_a_page_and_keeps_nothing_else(qlora: Path, base: Path, out: Path) -> None:
    ways = ("adapter:nf4", "merge:none", "merge:nf4", "merge:w4a16")
    options = [word for way in ways for word in ("--way", way)]

    result = invoke("compare", qlora, "--base", base, "--out", out, "--target", "cpu", *options)

    assert result.exit_code == 0, result.stderr
    assert {path.name for path in out.iterdir()} == {"comparison.html", "comparison.json"}
    document = json.loads((out / "comparison.json").read_text())
    adapter, exact, same_grid = document["rows"]
    assert adapter["quality"]["kl_mean"] < exact["quality"]["kl_mean"] < same_grid["quality"]["kl_mean"]
    assert adapter["chosen"]
    assert "needs AVX-512" in document["obstacles"][0]
    assert "<svg" in (out / "comparison.html").read_text()


def test_compare_of_one_way_twice_is_refused(qlora: Path, base: Path, out: Path) -> None:
    ways = ("--way", "merge:none", "--way", "merge:none:dequantized")

    result = invoke("compare", qlora, "--base", base, "--out", out, *ways)

    assert result.exit_code == 1
    assert "merge:none:dequantized is given twice with --way" in result.stderr


def test_compare_of_a_way_that_is_none_names_those_there_are(qlora: Path, base: Path, out: Path) -> None:
    result = invoke("compare", qlora, "--base", base, "--out", out, "--way", "merge:sideways")

    assert result.exit_code == 1
    assert "error[route_refused]" in result.stderr
    assert "merge:nf4:original" in result.stderr
    assert not out.exists()
