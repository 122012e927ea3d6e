from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from convert.conversion import Request, convert
from convert.detect import Training
from convert.errors import BaseMismatch, QualityGateFailed, RouteRefused, TrainingUnknown
from convert.routes.ways import CHOICES, WAYS, default_way, ways_for


def run(checkpoint: Path, base: Path, out: Path, **settings: Any) -> Any:
    return convert(
        Request(checkpoint=checkpoint, base=base, destination=out, **{"name": "tiny", "measure": False, **settings})
    )


@pytest.mark.parametrize("quantize", ["auto", "nf4"])
def test_a_4_bit_merge_of_a_qlora_is_refused_with_the_commands_that_work(
    qlora: Path, base: Path, out: Path, quantize: str
) -> None:
    with pytest.raises(RouteRefused) as caught:
        run(qlora, base, out, route="merge", quantize=quantize)

    message = str(caught.value)
    assert "rounds nearly all of the delta away" in message
    command = f"python -m convert run {qlora} --base {base} --out {out}"
    assert f"{command} --route adapter\n" in message
    assert f"{command} --route merge --quantize none\n" in message


@pytest.mark.parametrize("settings", [{}, {"route": "adapter"}])
def test_a_type_is_refused_where_nothing_is_merged_in_16_bits(
    qlora: Path, base: Path, out: Path, settings: dict[str, Any]
) -> None:
    with pytest.raises(RouteRefused, match="--dtype float16 is for a merged model that is not quantized"):
        run(qlora, base, out, dtype="float16", **settings)


def test_a_16_bit_adapter_of_a_qlora_is_refused(qlora: Path, base: Path, out: Path) -> None:
    with pytest.raises(RouteRefused, match="belongs on the 4-bit base"):
        run(qlora, base, out, route="adapter", quantize="none")


def test_a_refusal_repeats_what_the_user_said_of_the_training(unmarked: Path, base: Path, out: Path) -> None:
    with pytest.raises(RouteRefused, match="--trained-on 4bit --route adapter"):
        run(unmarked, base, out, route="merge", trained_on=Training.QLORA)


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
    with pytest.raises(BaseMismatch, match="only their 4-bit form"):
        run(lora, nf4_base, out, **settings)


def test_a_limit_that_cannot_be_measured_is_an_error_not_a_pass(
    lora: Path, base: Path, nf4_base: Path, out: Path
) -> None:
    with pytest.raises(QualityGateFailed, match="leave out --no-measure"):
        run(lora, base, out, max_kl=1.0)
    with pytest.raises(QualityGateFailed, match="full-precision base"):
        run(lora, nf4_base, out, route="adapter", max_kl=1.0, measure=True)


def test_a_limit_on_an_exact_way_needs_no_measurement(qlora: Path, base: Path, out: Path) -> None:
    assert run(qlora, base, out, max_kl=1e-9, measure=True).manifest.route.name == "adapter"


def test_every_way_is_chosen_by_its_own_flags() -> None:
    for way in WAYS:
        flags = dict(zip(way.flags.split()[::2], way.flags.split()[1::2], strict=True))
        asked = (way.training, flags["--route"], flags.get("--quantize", "auto"))
        assert CHOICES[asked] is way  # type: ignore[index]


@pytest.mark.parametrize("training", [Training.LORA, Training.QLORA])
def test_the_first_way_offered_is_the_default(training: Training) -> None:
    assert ways_for(training)[0] is default_way(training)


def test_inspecting_is_possible_without_the_model_libraries() -> None:
    import subprocess
    import sys

    program = (
        "import sys, convert.__main__, convert.inspection, convert.report\n"
        "print({'torch', 'transformers'} & sys.modules.keys())"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert result.stdout.strip() == "set()"
