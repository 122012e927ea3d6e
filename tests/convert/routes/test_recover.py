"""From a QLoRA back to a LoRA of the full-precision base: nearer to what was trained, and mergeable."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.artifact import Recovery
from convert.base_model import BaseModel
from convert.checkpoint import Checkpoint
from convert.detect import Training
from convert.distill import Course, Distilled, Lesson, distill, divergence, get_halves, lora_model, set_halves
from convert.errors import BaseMismatch, RouteRefused, TextUnreadable
from convert.nf4 import Nf4
from convert.progress import silent
from convert.routes.recover import recover, split, verdict
from tests.convert import parts
from tests.convert.asking import Request, convert

QUICK = Course(steps=30, learning_rate=2e-3)


def rows(count: int, seed: int = 0) -> list[list[int]]:
    """Text with structure: few different tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(20, 50, (20 + index % 5,), generator=generator).tolist() for index in range(count)]


@pytest.fixture(scope="module")
def recovered(qlora: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recovery]:
    folder = tmp_path_factory.mktemp("recovered")
    return folder, run(folder, qlora, base)


def run(
    folder: Path, adapter: Path, base: Path, course: Course = QUICK, count: int = 60, quantizer: Nf4 | None = None
) -> Recovery:
    folder.mkdir(exist_ok=True)
    opened, quantizer = BaseModel.open(base), quantizer or Nf4()
    return recover(folder, Checkpoint.open(adapter), opened, quantizer, rows(count), 16, silent, course)


def mean_divergence(expected: Any, found: Any, texts: list[list[int]]) -> float:
    each = [
        (parts.divergence(parts.logits(expected, ids)[:-1], parts.logits(found, ids)[:-1]), ids.shape[1] - 1)
        for ids in (torch.tensor([row]) for row in texts)
    ]
    return sum(kl * count for kl, count in each) / sum(count for _, count in each)


def test_it_comes_nearer_than_the_naive_merge_and_nearer_than_the_fit(recovered: tuple[Path, Recovery]) -> None:
    _, recovery = recovered

    assert recovery.kl_recovered < 0.9 * recovery.kl_start < 0.9 * recovery.kl_naive
    assert 0 < recovery.steps <= 30
    assert recovery.rank == 16
    assert "Beats the naive merge" in verdict(recovery)


def test_its_figures_are_those_of_pefts_models_on_the_rows_held_out(
    recovered: tuple[Path, Recovery], qlora: Path, base: Path
) -> None:
    folder, recovery = recovered
    held = rows(60)[4::5]

    as_trained = parts.with_adapter(parts.dequantized_model(base), qlora)
    naive = parts.with_adapter(parts.load_float32(base), qlora)
    found = parts.with_adapter(parts.load_float32(base), folder)
    assert recovery.kl_naive == pytest.approx(mean_divergence(as_trained, naive, held), rel=1e-3)
    assert recovery.kl_recovered == pytest.approx(mean_divergence(as_trained, found, held), rel=1e-3)


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
    recovery = run(tmp_path / "wild", qlora, base, course=Course(steps=10, learning_rate=10.0))

    assert recovery.steps == 0
    assert recovery.kl_recovered == recovery.kl_start < recovery.kl_naive


def test_what_helps_on_watched_rows_and_harms_on_those_held_out_is_not_taken(
    qlora: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def misled(model: Any, modules: list[str], *_: Any) -> Distilled:
        halves = {module: (3 * a, b) for module, (a, b) in get_halves(model, modules).items()}
        set_halves(model, halves)
        return Distilled(halves, steps=5, steps_done=5)

    monkeypatch.setattr("convert.routes.recover.distill", misled)

    recovery = run(tmp_path / "misled", qlora, base)

    assert (recovery.steps, recovery.kl_recovered) == (0, recovery.kl_start)
    found = parts.with_adapter(parts.load_float32(base), tmp_path / "misled")
    as_trained = parts.with_adapter(parts.dequantized_model(base), qlora)
    assert mean_divergence(as_trained, found, rows(60)[4::5]) == pytest.approx(recovery.kl_start, rel=1e-3)


class Lossless(Nf4):
    """A quantizer without an error: then the adapter on the full-precision weights is what was trained."""

    def quantize(self, module: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return {module: weight}

    def dequantize(self, module: str, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return parts[module].float()


def test_where_nothing_is_gained_the_adapter_is_written_as_it_is(qlora: Path, base: Path, tmp_path: Path) -> None:
    recovery = run(tmp_path / "as-it-is", qlora, base, course=Course(steps=2, learning_rate=1.0), quantizer=Lossless())

    assert recovery.kl_recovered == recovery.kl_naive == pytest.approx(0, abs=1e-6)
    assert "Nothing was gained" in verdict(recovery)
    assert Checkpoint.open(tmp_path / "as-it-is").ranks == (8,)


def test_no_row_is_in_two_parts_and_equal_rows_count_once() -> None:
    given = rows(40)

    found = split([*given, *given, [1]], most_trained=100)

    kept = [tuple(map(tuple, (row[0].tolist() for row in part))) for part in (found.trained, found.watched, found.held)]
    assert [len(part) for part in kept] == [24, 8, 8]
    assert len(set().union(*kept)) == 40


def test_too_few_rows_are_told(qlora: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(TextUnreadable, match="at least 10 different rows of two tokens or more, there are 9"):
        run(tmp_path / "few", qlora, base, count=9)


def test_a_4_bit_base_is_refused(qlora: Path, nf4_base: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseMismatch, match="ends on the full-precision weights"):
        run(tmp_path / "quantized", qlora, nf4_base)


@pytest.mark.parametrize("steps", [-1, 201])
def test_a_number_of_steps_beyond_the_bound_is_refused(qlora: Path, base: Path, tmp_path: Path, steps: int) -> None:
    with pytest.raises(RouteRefused, match="at most 200"):
        run(tmp_path / "long", qlora, base, course=Course(steps=steps))


def test_the_coarse_divergence_is_a_lower_bound_and_the_full_one_where_all_tokens_are_kept(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import convert.distill

    teacher, student = parts.dequantized_model(base), parts.load_float32(base)
    modules = list(BaseModel.open(base).linears)
    row, expected = parts.PROMPT, parts.logits(teacher)[:-1].log_softmax(-1)
    full = parts.divergence(expected, parts.logits(student)[:-1])
    model = lora_model(student, modules, 8)

    found = []
    for kept in (1, 16, 271):
        monkeypatch.setattr(convert.distill, "_KEPT_TOKENS", kept)
        found.append(divergence(model, [Lesson.of(row, expected)]))

    assert found[0] < found[1] < found[2]
    assert found[2] == pytest.approx(full, rel=1e-4)


def test_filled_up_rows_count_as_the_rows_alone(base: Path) -> None:
    """A batch's loss is the mean over the positions of its rows, whatever stands behind the shorter ones."""
    from convert.distill import _divergences

    teacher = parts.dequantized_model(base)
    model = lora_model(parts.load_float32(base), list(BaseModel.open(base).linears), 8)
    texts = [torch.tensor([row]) for row in rows(5)]
    lessons = [Lesson.of(row, parts.logits(teacher, row)[:-1].log_softmax(-1)) for row in texts]

    with torch.inference_mode():
        together = _divergences(model, lessons, 40)
        alone = torch.cat([_divergences(model, [lesson], len(lesson.row)) for lesson in lessons])

    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-5)


def test_the_stop_comes_when_what_is_watched_no_longer_falls(base: Path) -> None:
    """Taught one thing and watched by another: it must stop early and hand back the best."""
    modules = list(BaseModel.open(base).linears)
    student = lora_model(parts.load_float32(base), modules, 8)
    texts = [torch.tensor([row]) for row in rows(8)]
    other = parts.dequantized_model(base)
    lessons = [Lesson.of(row, parts.logits(other, row)[:-1].log_softmax(-1).roll(7, dims=1)) for row in texts]
    watched = [Lesson.of(row, parts.logits(student, row)[:-1].log_softmax(-1)) for row in texts]
    set_halves(student, {})

    found = distill(student, modules, lessons, watched, Course(steps=200, learning_rate=1e-2, patience=2), silent)

    assert (found.steps, found.steps_done) == (0, 10)
    assert divergence(student, watched) == pytest.approx(0, abs=1e-6)
