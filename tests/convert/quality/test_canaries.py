from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.artifact import Canaries
from convert.errors import TextUnreadable
from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel
from convert.inputs.chat.tokenizer import Tokenizer
from convert.progress import silent
from convert.quality import Answer, Canary, Text, compute_reference, examine, open_canaries
from convert.quality.canaries import ANSWER_TOKENS, ask, count_passed
from convert.quality.models.streamed_model import StreamedModel
from tests.convert import parts

QUESTION = [{"role": "user", "content": "the rain"}]


def lines(path: Path, *documents: Any) -> Path:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


def greedy_answer(model: Any, base: Path, count: int = ANSWER_TOKENS) -> str:
    """The greedy answer, one forward pass a token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    rendered = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(rendered)["input_ids"]
    answer_ids: list[int] = []
    while len(answer_ids) < count and (not answer_ids or answer_ids[-1] != tokenizer.eos_token_id):
        answer_ids.append(int(parts.logits(model, torch.tensor([ids + answer_ids]))[-1].argmax()))
    return tokenizer.decode(answer_ids, skip_special_tokens=True)


def test_the_answer_is_the_greedy_one_of_the_written_model(lora: Path, base: Path) -> None:
    expected = greedy_answer(parts.load_float32(base), base)
    canary = Canary(tuple(QUESTION), expected[3:9])

    (answer,) = ask(StreamedModel(BaseModel.open(base)), Tokenizer.open(base), [canary], "result", silent)

    assert answer == Answer(canary, expected)
    assert answer.passed


def test_reference_and_result_are_both_asked_and_the_result_counted(lora: Path, base: Path, tmp_path: Path) -> None:
    trained = greedy_answer(parts.with_adapter(parts.load_float32(base), lora), base)
    untrained = greedy_answer(parts.load_float32(base), base)
    assert trained[:12] != untrained[:12]
    text = Text("t", ("the rain in spain",))
    canaries = [Canary(tuple(QUESTION), trained[:12])]

    expected = compute_reference(Checkpoint.open(lora), BaseModel.open(base), None, base, text, silent, canaries)
    kept = examine(expected, base, lora, silent)
    lost = examine(expected, base, None, silent)

    assert [answer.text for answer in expected.answers] == [trained]
    assert [answer.text for answer in kept.answers] == [trained]
    assert [answer.text for answer in lost.answers] == [untrained]
    assert kept.quality.canaries == Canaries(asked=1, passed=1, passed_as_trained=1)
    assert lost.quality.canaries == Canaries(asked=1, passed=0, passed_as_trained=1)


@pytest.mark.parametrize("is_first", [True, False])
def test_an_answer_ends_at_every_token_that_the_generation_config_says(
    base: Path, tmp_path: Path, is_first: bool
) -> None:
    copied = parts.copy(base, tmp_path / "copy")
    canary = Canary(tuple(QUESTION), "x")
    long = greedy_answer(parts.load_float32(base), base)
    logits = parts.logits(parts.load_float32(base), torch.tensor([Tokenizer.open(base).prompt_ids(QUESTION)]))
    ends, never = int(logits[-1].argmax()), int(logits[-1].argmin())
    parts.edit_json(copied / "generation_config.json", eos_token_id=[ends, never] if is_first else [never, ends])

    (answer,) = ask(StreamedModel(BaseModel.open(copied)), Tokenizer.open(copied), [canary], "result", silent)

    assert len(answer.text) < len(long)


@pytest.mark.parametrize(("text", "passes"), [("It is MARMALADE.", True), ("It is jam.", False), ("", False)])
def test_the_expected_text_is_looked_for_in_any_case(text: str, passes: bool) -> None:
    assert Answer(Canary(tuple(QUESTION), "Marmalade"), text).passed is passes


def test_nothing_asked_is_no_figure() -> None:
    assert count_passed([], []) is None


def test_a_file_of_canaries_is_read(tmp_path: Path) -> None:
    path = lines(tmp_path / "canaries.jsonl", {"messages": QUESTION, "expect": " in Spain ", "note": "ignored"})

    assert open_canaries(path) == (Canary(tuple(QUESTION), "in Spain"),)


@pytest.mark.parametrize(
    "document",
    [
        {"messages": QUESTION},
        {"messages": QUESTION, "expect": ""},
        {"messages": QUESTION, "expect": 7},
        {"messages": [], "expect": "x"},
        {"messages": [{"role": "user"}], "expect": "x"},
        {"messages": [{"role": "user", "content": ["x"]}], "expect": "x"},
        {"messages": [*QUESTION, {"role": "assistant", "content": "x"}], "expect": "x"},
        {"text": "the rain", "expect": "x"},
        ["x"],
        7,
    ],
)
def test_an_invalid_canary_is_refused_with_its_line(tmp_path: Path, document: Any) -> None:
    path = lines(tmp_path / "canaries.jsonl", {"messages": QUESTION, "expect": "x"}, document)

    with pytest.raises(TextUnreadable, match=r"canaries\.jsonl, line 2: "):
        open_canaries(path)


@pytest.mark.parametrize("content", ["", "\n \n", "{", "[" * 100_000])
def test_a_file_without_json_lines_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "canaries.jsonl"
    path.write_text(content)

    with pytest.raises(TextUnreadable, match=r"canaries\.jsonl.*expect"):
        open_canaries(path)
