"""Adapters that were really trained by PEFT: what the losses of the user's answers say of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from convert.detection.losses import CONTROLS, MIN_ROWS, LossComparison, compare_losses
from convert.detection.training import Training
from convert.errors import TrainingUnknown
from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel
from convert.progress import silent
from convert.quality import Text, TokenizedText, Tokenizer, tokenize
from convert.quantization.nf4 import Nf4
from tests.convert import parts
from tests.convert.asking import Request, convert
from tests.convert.detection.trainings import HELD_OUT, Recipe, chats, measure, recipes, save_pretrained_base, train


def compared(checkpoint: Path, base: Path, tokens: TokenizedText) -> LossComparison:
    return compare_losses(Checkpoint.open(checkpoint), BaseModel.open(base), Nf4(), tokens, silent)


def written_by(model: Any, count: int, user_tokens: int = 0) -> TokenizedText:
    """Text that a model writes itself: no other function has a smaller loss on it. The first tokens are the user's."""
    torch.manual_seed(4)
    start = torch.randint(0, parts.VOCABULARY, (count, 1 + user_tokens))
    written = model.generate(start, max_new_tokens=32, min_new_tokens=32, do_sample=True, top_k=0)
    mask = torch.ones(written.shape[1] - 1, dtype=torch.bool)
    mask[:user_tokens] = False
    return TokenizedText(tuple(row[None] for row in written), (mask,) * count, (), 0, ())


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pretrained_base(tmp_path_factory.mktemp("pretrained") / "base")


# Every third of the trainings in the table of docs/explanation/routes.md.
@pytest.mark.parametrize("recipe", list(recipes())[1::3], ids=str)
def test_no_real_training_is_taken_for_the_other_kind(recipe: Recipe, pretrained: Path, tmp_path: Path) -> None:
    measurement = measure(recipe, pretrained, train(recipe, pretrained, tmp_path / "adapter"))

    assert measurement.training in (recipe.training, Training.UNKNOWN)


def test_answers_that_only_the_4_bit_function_would_write_decide(qlora: Path, base: Path) -> None:
    adapted = parts.with_adapter(parts.dequantized_model(base), qlora)

    comparison = compared(qlora, base, written_by(adapted, 64))

    assert comparison.decides
    assert len(comparison.controls) == CONTROLS
    assert comparison.confidence.startswith("t = ")
    assert "so it was trained against the 4-bit weights" in comparison.sentence


def test_the_smaller_loss_on_the_original_weights_decides_nothing(qlora: Path, base: Path) -> None:
    adapted = parts.with_adapter(parts.load_float32(base), qlora)

    comparison = compared(qlora, base, written_by(adapted, 24))

    assert comparison.t < -3
    assert not comparison.decides
    assert "a LoRA is like this, and so is a QLoRA after a short training" in comparison.sentence


def test_a_text_that_fits_the_4_bit_base_itself_decides_nothing(base: Path, tmp_path: Path) -> None:
    """The adapter changes next to nothing, so dq + D is better than W16 + D only because dq is."""
    adapter = parts.save_adapter(base, tmp_path / "adapter", strength=1e-4)

    comparison = compared(adapter, base, written_by(parts.dequantized_model(base), 24))

    assert comparison.t > 3
    assert comparison.t_beyond_base < comparison.t
    assert not comparison.decides


def test_the_losses_are_those_of_the_answers_in_pefts_models(qlora: Path, base: Path) -> None:
    tokens = written_by(parts.load_float32(base), 9, user_tokens=8)

    comparison = compared(qlora, base, tokens)

    def losses(model: Any) -> torch.Tensor:
        with torch.inference_mode():
            return torch.stack(
                [cross_entropy(model(row).logits[0, 8:-1].double(), row[0, 9:]) for row in tokens.measured]
            )

    full, four_bit = parts.load_float32(base), parts.dequantized_model(base)
    alone = losses(full) - losses(four_bit)
    adapted_full = losses(parts.with_adapter(full, qlora))
    adapted_four_bit = losses(parts.with_adapter(four_bit, qlora))
    difference = adapted_full - adapted_four_bit
    beyond = difference - alone
    assert comparison.full == pytest.approx(float(adapted_full.mean()), rel=1e-5)
    assert comparison.four_bit == pytest.approx(float(adapted_four_bit.mean()), rel=1e-5)
    assert comparison.t == pytest.approx(float(difference.mean() / difference.std() * 3), rel=1e-2)
    assert comparison.t_beyond_base == pytest.approx(float(beyond.mean() / beyond.std() * 3), rel=1e-2)
    assert comparison.rows == 9


@pytest.mark.parametrize("count", [1, MIN_ROWS - 1])
def test_few_rows_decide_nothing_and_more_are_asked_for(qlora: Path, base: Path, count: int) -> None:
    tokens = written_by(parts.with_adapter(parts.dequantized_model(base), qlora), count)

    comparison = compared(qlora, base, tokens)

    assert not comparison.decides
    assert f"undecided: give {MIN_ROWS} rows with answers or more" in comparison.sentence


def test_a_difference_in_the_noise_asks_for_as_many_rows_as_it_would_need() -> None:
    comparison = LossComparison(full=1.1, four_bit=1.0, t=1.5, t_beyond_base=2.0, rows=10)

    assert not comparison.decides
    assert "about 40 rows are needed" in comparison.sentence


def test_an_advantage_that_random_errors_share_decides_nothing() -> None:
    comparison = LossComparison(full=1.1, four_bit=1.0, t=9.0, t_beyond_base=9.0, rows=10, controls=(-9.0, -9.0, 1.0))

    assert not comparison.decides
    assert "random errors of the same size do the same" in comparison.sentence


def test_rows_without_an_answer_do_not_count(qlora: Path, base: Path) -> None:
    question = [{"role": "user", "content": "the rain"}]

    comparison = compared(qlora, base, tokenize(Text("t", (question,) * 9), Tokenizer.open(base)))

    assert comparison.rows == 0
    assert "undecided" in comparison.sentence


def test_what_was_measured_is_published_as_measured(pretrained: Path, tmp_path: Path, out: Path) -> None:
    recipe = Recipe(Training.QLORA, "lists", steps=150, rank=16)
    adapter = train(recipe, pretrained, tmp_path / "adapter")
    text = tmp_path / "held.jsonl"
    text.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats(recipe.text)[:HELD_OUT]))

    origin = convert(Request(adapter, pretrained, out, text=text)).manifest.origin

    assert origin.training == "qlora"
    assert origin.confidence
    assert origin.confidence.startswith(("t = ", "z = "))


def test_a_lora_that_no_file_says_is_never_guessed(pretrained: Path, tmp_path: Path, out: Path) -> None:
    recipe = Recipe(Training.LORA, "lists", steps=40, rank=8)
    adapter = train(recipe, pretrained, tmp_path / "adapter")
    text = tmp_path / "held.jsonl"
    text.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats(recipe.text)[:HELD_OUT]))

    with pytest.raises(TrainingUnknown, match="undecided"):
        convert(Request(adapter, pretrained, out, text=text))
