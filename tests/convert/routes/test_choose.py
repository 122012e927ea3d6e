from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from convert.detection.training import Training
from convert.errors import BaseMismatch, QualityGateFailed, RouteRefused, TrainingUnknown
from convert.quantization.targets import EXAMPLES, merged_order, works
from convert.routes.choose import RouteOptions, requested_variants
from convert.routes.variants import OFFERED, VARIANTS, RouteVariant
from tests.convert import parts
from tests.convert.asking import Request, convert


def run(checkpoint: Path, base: Path, out: Path, **settings: Any) -> Any:
    return convert(
        Request(checkpoint=checkpoint, base=base, destination=out, **{"name": "tiny", "measure": False, **settings})
    )


def test_a_4_bit_merge_of_a_qlora_is_refused_with_the_commands_that_work(qlora: Path, base: Path, out: Path) -> None:
    with pytest.raises(RouteRefused) as caught:
        run(qlora, base, out, route="merge", quantize="nf4")

    message = str(caught.value)
    assert "removes nearly all of the delta" in message
    command = f"python -m convert run {qlora} --base {base} --out DIR"
    assert f"{command} --route adapter\n" in message
    assert f"{command} --route merge --quantize none\n" in message
    assert f"{command} --route merge --quantize nf4 --merge-onto original\n" in message


def test_a_4_bit_merge_of_a_qlora_is_written_with_force_and_its_retention_is_measured(
    base: Path, tmp_path: Path, out: Path
) -> None:
    weak = parts.mark_qlora(parts.save_adapter(base, tmp_path / "weak", strength=0.005))

    artifact = run(weak, base, out, route="merge", quantize="nf4", force=True, measure=True)

    assert artifact.manifest.model.quantization == "nf4-double"
    assert artifact.manifest.quality.retention.mean < 0.5


@pytest.mark.parametrize("settings", [{}, {"route": "adapter"}])
def test_a_dtype_is_refused_where_nothing_is_merged_in_16_bits(
    qlora: Path, base: Path, out: Path, settings: dict[str, Any]
) -> None:
    with pytest.raises(RouteRefused, match="--dtype float16 is for a merged model that is not quantized"):
        run(qlora, base, out, dtype="float16", **settings)


def test_a_16_bit_adapter_of_a_qlora_is_refused(qlora: Path, base: Path, out: Path) -> None:
    with pytest.raises(RouteRefused, match="belongs on the 4-bit base"):
        run(qlora, base, out, route="adapter", quantize="none")


def test_a_refusal_repeats_what_the_user_said_of_the_training(unmarked: Path, base: Path, out: Path) -> None:
    with pytest.raises(RouteRefused, match="--trained-on 4bit --route adapter"):
        run(unmarked, base, out, route="merge", quantize="nf4", trained_on=Training.QLORA)


def test_unknown_training_stops_until_the_user_says_it(unmarked: Path, base: Path, out: Path) -> None:
    with pytest.raises(TrainingUnknown, match="--trained-on"):
        run(unmarked, base, out)

    artifact = run(unmarked, base, out, trained_on=Training.QLORA)

    assert artifact.manifest.origin.training == "qlora"
    assert "double quantization is assumed" in artifact.manifest.route.reason


@pytest.mark.parametrize(
    "settings", [{}, {"route": "merge", "quantize": "none"}, {"route": "adapter", "quantize": "none"}], ids=str
)
def test_a_lora_needs_the_full_precision_base(lora: Path, nf4_base: Path, out: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(BaseMismatch, match=r"only a rounded form of them \(nf4"):
        run(lora, nf4_base, out, **settings)


def test_a_limit_that_cannot_be_measured_is_an_error_not_a_pass(
    lora: Path, base: Path, nf4_base: Path, out: Path
) -> None:
    with pytest.raises(QualityGateFailed, match="leave out --no-measure"):
        run(lora, base, out, max_kl=1.0, quantize="nf4")
    with pytest.raises(QualityGateFailed, match="full-precision base"):
        run(lora, nf4_base, out, route="adapter", max_kl=1.0, measure=True)


def test_a_limit_on_an_exact_route_needs_no_measurement(qlora: Path, base: Path, out: Path) -> None:
    assert run(qlora, base, out, max_kl=1e-9, measure=True).manifest.route.name == "adapter"


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: f"{variant.training.value} {variant.flags}")
def test_every_variant_is_chosen_by_its_own_flags(variant: RouteVariant) -> None:
    words = variant.flags.replace("--force", "").split()
    flags: dict[str, Any] = dict(zip(words[::2], words[1::2], strict=True))
    options = RouteOptions(flags["--route"], flags.get("--quantize", "auto"), flags.get("--merge-onto", "auto"),
                force="--force" in variant.flags)  # fmt: skip

    assert requested_variants(variant.training, options, ("none",), "command") == (variant,)


def test_what_is_offered_never_rounds_the_delta_away() -> None:
    assert not any(variant.is_same_grid for variant in OFFERED)


@pytest.mark.parametrize("target", EXAMPLES)
def test_a_storage_left_open_is_one_that_the_target_serves_and_the_last_is_16_bits(target: str) -> None:
    order = merged_order(target)

    assert all(works(target, "nf4-double" if name == "nf4" else name, with_adapter=False) for name in order)
    assert order[-1] == "none"
    assert len(set(order)) == len(order) >= 2


def test_without_options_a_qlora_stays_the_function_that_was_trained() -> None:
    (variant,) = requested_variants(Training.QLORA, RouteOptions(), merged_order("cpu"), "command")

    assert variant.is_exact


def test_without_options_a_lora_gets_the_first_storage_that_keeps_its_gain(lora: Path, base: Path, out: Path) -> None:
    manifest = run(lora, base, out, measure=True).manifest

    tried = [trial.quantization for trial in manifest.trials]
    storages = ["nf4-double", "none"]
    assert [*tried, manifest.model.quantization] == storages[: len(tried) + 1]
    assert all(trial.quality.kl_mean > 0.05 or trial.quality.gain_kept < 0.95 for trial in manifest.trials)
    assert manifest.quality.kl_mean <= 0.05 or manifest.model.quantization == "none"
    assert manifest.quality.distance_kept >= 0.9
    assert all(name in manifest.route.reason for name in tried)


def test_a_weak_fine_tune_is_not_given_a_storage_whose_rounding_is_larger(
    base: Path, tmp_path: Path, out: Path
) -> None:
    """By its KL alone the 4-bit result would pass, though the base without the adapter is nearer to the fine-tune."""
    weak = parts.mark_lora(parts.save_adapter(base, tmp_path / "weak", strength=0.002))

    manifest = run(weak, base, out, target="cpu", max_kl=1.0, measure=True).manifest

    assert manifest.trials[0].quantization == "nf4-double"
    assert manifest.trials[0].quality.kl_mean > manifest.trials[0].quality.kl_base
    assert "keeps 0.0% of what training changed" in manifest.trials[0].verdict
    assert manifest.quality.distance_kept >= 0.9
    assert "nf4-double (KL " in manifest.route.reason
    assert "0.0% of what training changed kept" in manifest.route.reason


def test_a_fine_tune_that_the_text_does_not_show_stays_separate(base: Path, tmp_path: Path, out: Path) -> None:
    nothing = parts.mark_lora(parts.save_adapter(base, tmp_path / "nothing", strength=1e-7))

    manifest = run(nothing, base, out, target="cpu", measure=True).manifest

    assert (manifest.route.name, manifest.model.quantization) == ("adapter", "none")
    assert "whether it keeps what training changed can't be told on this text" in manifest.route.reason


def test_without_a_measurement_a_lora_stays_separate(lora: Path, base: Path, out: Path) -> None:
    manifest = run(lora, base, out, target="cpu").manifest

    assert (manifest.route.name, manifest.model.quantization) == ("adapter", "none")
    assert "Nothing was measured" in manifest.route.reason


def test_without_a_measurement_a_merge_is_stored_in_16_bits(lora: Path, base: Path, out: Path) -> None:
    manifest = run(lora, base, out, route="merge", target="cpu").manifest

    assert (manifest.route.name, manifest.model.quantization) == ("merge", "none")


def test_a_lora_that_no_engine_serves_as_an_adapter_is_merged(base: Path, tmp_path: Path, out: Path) -> None:
    dora = parts.mark_lora(parts.save_adapter(base, tmp_path / "dora", use_dora=True))

    manifest = run(dora, base, out, target="cpu").manifest

    assert (manifest.route.name, manifest.model.quantization) == ("merge", "none")


def test_inspecting_is_possible_without_the_model_libraries() -> None:
    import subprocess
    import sys

    program = (
        "import sys, convert.cli.app, convert.pipeline.inspect, convert.cli.report.inspection\n"
        "print({'torch', 'transformers'} & sys.modules.keys())"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize("settings", [{}, {"route": "adapter"}], ids=str)
def test_on_the_16_bit_base_of_an_artifact_the_next_lora_shares_that_base(
    lora: Path, base: Path, tmp_path: Path, out: Path, settings: dict[str, Any]
) -> None:
    first = run(lora, base, tmp_path / "first", route="adapter", quantize="none")

    second = run(lora, tmp_path / "first", out, measure=True, **settings)

    assert not (out / "model").exists()
    assert second.manifest.model.fingerprint == first.manifest.model.fingerprint


def test_a_qlora_on_the_16_bit_base_of_an_artifact_says_that_it_gets_another_base(
    lora: Path, qlora: Path, base: Path, tmp_path: Path, out: Path
) -> None:
    first = run(lora, base, tmp_path / "first", route="adapter", quantize="none")

    second = run(qlora, tmp_path / "first", out)

    assert second.manifest.model.fingerprint != first.manifest.model.fingerprint
    assert "can't be published beside the artifact's adapter" in second.manifest.route.reason
