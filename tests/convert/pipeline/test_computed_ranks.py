"""The rank of an adapter that `rebase` and `recover` compute, and checkpoints for which they can compute none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from convert.artifact import VLLM_LORA_RANKS
from convert.errors import CheckpointUnsupported, ConvertError
from convert.pipeline.compare import compare
from convert.pipeline.dry_run import dry_run
from convert.pipeline.inspect import inspect
from convert.progress import silent
from convert.routes.low_rank import default_rank
from convert.routes.variants import RouteOption
from tests.convert import parts
from tests.convert.asking import Request, convert

ROUTES: tuple[RouteOption, ...] = ("auto", "adapter", "merge", "rebase", "recover")


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.jsonl"
    path.write_text("".join(json.dumps({"text": f"in spain there is rain number {n}"}) + "\n" for n in range(10)))
    return path


@pytest.fixture(scope="module", params=["lora", "qlora"])
def without_linear_layers(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that trains the embedding alone."""
    folder = tmp_path_factory.mktemp("embedding") / "adapter"
    adapter = parts.save_adapter(base, folder, target_modules=["embed_tokens"])
    torch.manual_seed(1)
    parts.edit_weights(adapter, lambda tensors: {name: torch.randn(t.shape) for name, t in tensors.items()})
    return parts.mark_lora(adapter) if request.param == "lora" else parts.mark_qlora(adapter)


@pytest.mark.parametrize(
    ("trained", "expected"), [(8, 64), (32, 64), (48, 128), (64, 128), (100, 256), (144, 320), (200, 512), (300, 512)]
)
def test_the_default_rank_is_one_that_vllm_serves(trained: int, expected: int) -> None:
    assert default_rank(trained) == expected
    assert expected in VLLM_LORA_RANKS


def test_the_default_rank_is_announced_before_the_first_byte_and_written(base: Path, tmp_path: Path, out: Path) -> None:
    checkpoint = parts.mark_qlora(parts.save_adapter(base, tmp_path / "r48", r=48))
    request = Request(checkpoint, base, out, route="rebase", measure=False)
    announced: list[str] = []

    def record(step: str, done: int, total: int) -> None:
        if "rank 128" in step and not list(out.parent.rglob("*.safetensors")):
            announced.append(step)

    (planned,) = dry_run(request.full, silent).variants
    artifact = convert(request, record)

    assert planned.candidate
    assert "rank 128, of which 80 are for the correction" in planned.candidate.choice.reason
    assert planned.candidate.choice.reason in artifact.manifest.route.reason
    assert announced
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["r"] == 128


@pytest.mark.parametrize("route", ROUTES)
def test_a_checkpoint_without_linear_layers_is_converted_or_refused_with_a_reason(
    without_linear_layers: Path, base: Path, calibration: Path, out: Path, route: RouteOption
) -> None:
    request = Request(without_linear_layers, base, out, route=route, calibration=calibration)
    offers = inspect(without_linear_layers, base).offers
    possible = {offer.variant.route for offer in offers if offer.obstacle is None}

    assert possible == {"merge"}
    if route == "merge" or (route == "auto" and offers[0].variant.training.value == "lora"):
        assert any(planned.candidate for planned in dry_run(request.full, silent).variants)
        convert(request)
        return
    errors: list[ConvertError] = []
    for attempt in (lambda: dry_run(request.full, silent), lambda: convert(request)):
        with pytest.raises(ConvertError) as caught:
            attempt()
        errors.append(caught.value)
    assert str(errors[0]) == str(errors[1])
    if isinstance(errors[0], CheckpointUnsupported):
        assert "--route merge" in str(errors[0])
        assert "merge or adapter" not in str(errors[0])


def test_a_checkpoint_without_linear_layers_is_compared(without_linear_layers: Path, base: Path) -> None:
    request = Request(without_linear_layers, base, Path("unused"))

    rows = compare(request.full, None, speed=False, progress=silent).comparison.rows

    assert {row.route for row in rows} == {"merge"}
