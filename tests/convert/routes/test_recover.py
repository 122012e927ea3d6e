"""From a QLoRA back to a LoRA of the full-precision base: nearer to what was trained, and mergeable."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.artifact import Recovery
from convert.detection.training import Training
from convert.errors import BaseMismatch, RouteRefused, TextUnreadable
from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel
from convert.progress import silent
from convert.quantization.nf4 import Nf4
from convert.routes.distillation import (
    DistillationExample,
    DistillationResult,
    Student,
    TrainingSchedule,
    distill,
    divergence,
)
from convert.routes.recover import recover, split
from convert.routes.trained_adapter import TrainedAdapter
from tests.convert import parts
from tests.convert.asking import Request, convert

QUICK = TrainingSchedule(steps=30, learning_rate=2e-3)


def rows(count: int, seed: int = 0) -> list[list[int]]:
    """Text with structure: few different tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(20, 50, (20 + index % 5,), generator=generator).tolist() for index in range(count)]


@pytest.fixture(scope="module")
def recovered(qlora: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recovery]:
    folder = tmp_path_factory.mktemp("recovered")
    return folder, run(folder, qlora, base)


def run(
    folder: Path,
    adapter: Path,
    base: Path,
    schedule: TrainingSchedule = QUICK,
    count: int = 60,
    quantizer: Nf4 | None = None,
) -> Recovery:
    folder.mkdir(exist_ok=True)
    trained = TrainedAdapter(Checkpoint.open(adapter), BaseModel.open(base), quantizer or Nf4())
    return recover(folder, trained, rows(count), 16, schedule, silent)


def mean_divergence(expected: Any, actual: Any, texts: list[list[int]]) -> float:
    """Mean KL(expected || actual) of two models over every position but the last of each text."""
    kl_and_count = [
        (parts.divergence(parts.logits(expected, ids)[:-1], parts.logits(actual, ids)[:-1]), ids.shape[1] - 1)
        for ids in (torch.tensor([row]) for row in texts)
    ]
    return sum(kl * count for kl, count in kl_and_count) / sum(count for _, count in kl_and_count)


def test_it_comes_nearer_than_the_naive_merge_and_nearer_than_the_fit(recovered: tuple[Path, Recovery]) -> None:
    _, recovery = recovered

    assert recovery.kl_recovered < 0.9 * recovery.kl_start < 0.9 * recovery.kl_naive
    assert 0 < recovery.steps <= 30
    assert recovery.rank == 16


def test_its_figures_are_those_of_pefts_models_on_the_rows_held_out(
    recovered: tuple[Path, Recovery], qlora: Path, base: Path
) -> None:
    folder, recovery = recovered
    held_out = rows(60)[4::5]

    as_trained = parts.with_adapter(parts.dequantized_model(base), qlora)
    naive = parts.with_adapter(parts.load_float32(base), qlora)
    recovered_model = parts.with_adapter(parts.load_float32(base), folder)
    assert recovery.kl_naive == pytest.approx(mean_divergence(as_trained, naive, held_out), rel=1e-3)
    assert recovery.kl_recovered == pytest.approx(mean_divergence(as_trained, recovered_model, held_out), rel=1e-3)


def test_on_text_it_never_saw_the_merged_model_is_nearer_to_what_was_trained(
    recovered: tuple[Path, Recovery], qlora: Path, base: Path, out: Path
) -> None:
    folder, _ = recovered
    unseen = rows(10, seed=99)

    artifact = convert(
        Request(folder, base, out, "tiny", route="merge", quantize="none", trained_on=Training.LORA, measure=False)
    )

    as_trained = parts.with_adapter(parts.dequantized_model(base), qlora)
    naive = parts.with_adapter(parts.load_float32(base), qlora)
    merged = parts.load_float32(artifact.root / "model")
    assert artifact.manifest.route.merged_onto == "original"
    assert mean_divergence(as_trained, merged, unseen) < 0.8 * mean_divergence(as_trained, naive, unseen)


def test_the_checkpoint_says_what_it_is(recovered: tuple[Path, Recovery], base: Path) -> None:
    folder, _ = recovered

    assert json.loads((folder / "graft_training.json").read_text()) == {
        "schema": "graft.training/1",
        "trained_on": "full",
        "quantizer": None,
    }
    assert parts.tree(folder) == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "graft_training.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    Checkpoint.open(folder).require_supported()


def test_the_same_input_gives_the_same_bytes(
    recovered: tuple[Path, Recovery], qlora: Path, base: Path, tmp_path: Path
) -> None:
    folder, recovery = recovered
    torch.manual_seed(1234)

    again = run(tmp_path / "again", qlora, base)

    assert again == recovery
    for name in parts.tree(folder):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name


def test_training_that_only_harms_leaves_the_fit(qlora: Path, base: Path, tmp_path: Path) -> None:
    recovery = run(tmp_path / "wild", qlora, base, schedule=TrainingSchedule(steps=10, learning_rate=10.0))

    assert recovery.steps == 0
    assert recovery.kl_recovered == recovery.kl_start < recovery.kl_naive


def test_training_that_helps_validation_rows_and_harms_held_out_rows_is_not_taken(
    qlora: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overfit(student: Student, *_: Any) -> DistillationResult:
        matrices = {module: (3 * a, b) for module, (a, b) in student.matrices.items()}
        student.load(matrices)
        return DistillationResult(matrices, best_step=5, steps_run=5)

    monkeypatch.setattr("convert.routes.recover.distill", overfit)

    recovery = run(tmp_path / "overfit", qlora, base)

    assert (recovery.steps, recovery.kl_recovered) == (0, recovery.kl_start)
    written = parts.with_adapter(parts.load_float32(base), tmp_path / "overfit")
    as_trained = parts.with_adapter(parts.dequantized_model(base), qlora)
    assert mean_divergence(as_trained, written, rows(60)[4::5]) == pytest.approx(recovery.kl_start, rel=1e-3)


class Lossless(Nf4):
    """A quantizer without an error: then the adapter on the full-precision weights is what was trained."""

    def quantize(self, module: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return {module: weight}

    def dequantize(self, module: str, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return parts[module].float()


def test_where_nothing_is_gained_the_adapter_is_written_as_it_is(qlora: Path, base: Path, tmp_path: Path) -> None:
    recovery = run(
        tmp_path / "as-it-is", qlora, base, schedule=TrainingSchedule(steps=2, learning_rate=1.0), quantizer=Lossless()
    )

    assert recovery.kl_recovered == recovery.kl_naive == pytest.approx(0, abs=1e-6)
    assert Checkpoint.open(tmp_path / "as-it-is").ranks == (8,)


def test_no_row_is_in_two_parts_and_equal_rows_count_once() -> None:
    unique = rows(40)

    row_split = split([*unique, *unique, [1]], max_training_rows=100)

    row_parts = [
        {tuple(row[0].tolist()) for row in part}
        for part in (row_split.training, row_split.validation, row_split.held_out)
    ]
    assert [len(part) for part in row_parts] == [24, 8, 8]
    assert len(set().union(*row_parts)) == 40


def test_too_few_rows_are_refused(qlora: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(TextUnreadable, match="at least 10 different rows of two tokens or more, there are 9"):
        run(tmp_path / "few", qlora, base, count=9)


def test_a_4_bit_base_is_refused(qlora: Path, nf4_base: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseMismatch, match="ends on the full-precision weights"):
        run(tmp_path / "quantized", qlora, nf4_base)


@pytest.mark.parametrize("steps", [-1, 201])
def test_a_number_of_steps_beyond_the_bound_is_refused(qlora: Path, base: Path, tmp_path: Path, steps: int) -> None:
    with pytest.raises(RouteRefused, match="at most 200"):
        run(tmp_path / "long", qlora, base, schedule=TrainingSchedule(steps=steps))


def test_the_coarse_divergence_is_a_lower_bound_and_the_full_one_where_all_tokens_are_kept(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import convert.routes.distillation

    teacher, modules = parts.dequantized_model(base), list(BaseModel.open(base).linears)
    row, expected = parts.PROMPT, parts.logits(teacher)[:-1].log_softmax(-1)
    full = parts.divergence(expected, parts.logits(parts.load_float32(base))[:-1])
    student = Student(parts.load_float32(base), modules, 8)

    coarse = []
    for top_tokens in (1, 16, 271):
        monkeypatch.setattr(convert.routes.distillation, "_TOP_TOKENS", top_tokens)
        coarse.append(divergence(student, [DistillationExample.of(row, expected)]))

    assert coarse[0] < coarse[1] < coarse[2]
    assert coarse[2] == pytest.approx(full, rel=1e-4)


def test_padded_rows_count_as_the_rows_alone(base: Path) -> None:
    """A batch's loss is the mean over the positions of its rows, without the padding after the shorter ones."""
    from convert.routes.distillation import _divergences

    teacher = parts.dequantized_model(base)
    student = Student(parts.load_float32(base), list(BaseModel.open(base).linears), 8)
    texts = [torch.tensor([row]) for row in rows(5)]
    examples = [DistillationExample.of(row, parts.logits(teacher, row)[:-1].log_softmax(-1)) for row in texts]

    with torch.inference_mode():
        together = _divergences(student, examples, 40)
        alone = torch.cat([_divergences(student, [example], len(example.token_ids)) for example in examples])

    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-5)


def test_the_training_stops_when_the_validation_divergence_no_longer_falls(base: Path) -> None:
    """With another teacher for training than for validation it must stop early, and leave the best matrices."""
    modules = list(BaseModel.open(base).linears)
    student = Student(parts.load_float32(base), modules, 8)
    texts = [torch.tensor([row]) for row in rows(8)]
    other = parts.dequantized_model(base)
    training = [
        DistillationExample.of(row, parts.logits(other, row)[:-1].log_softmax(-1).roll(7, dims=1)) for row in texts
    ]
    validation = [DistillationExample.of(row, parts.logits(student.model, row)[:-1].log_softmax(-1)) for row in texts]

    result = distill(student, training, validation, TrainingSchedule(steps=200, learning_rate=1e-2, patience=2), silent)

    assert (result.best_step, result.steps_run) == (0, 10)
    assert divergence(student, validation) == pytest.approx(0, abs=1e-6)
