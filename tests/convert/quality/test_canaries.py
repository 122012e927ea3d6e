from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.artifact import Canaries
from convert.base_model import BaseModel
from convert.checkpoint import Checkpoint
from convert.errors import TextUnreadable
from convert.progress import silent
from convert.quality import Answer, Canary, Text, examine, load, open_canaries, reference
from convert.quality.canaries import ANSWER_TOKENS, ask, passed
from convert.quality.tokenizer import Tokenizer
from tests.convert import parts

QUESTION = [{"role": "user", "content": "the rain"}]


def lines(path: Path, *documents: Any) -> Path:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


def oracle(model: Any, base: Path, count: int = ANSWER_TOKENS) -> str:
    """The greedy answer, one forward pass a token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    rendered = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(rendered)["input_ids"]
    found: list[int] = []
    while len(found) < count and (not found or found[-1] != tokenizer.eos_token_id):
        found.append(int(parts.logits(model, torch.tensor([ids + found]))[-1].argmax()))
    return tokenizer.decode(found, skip_special_tokens=True)


def test_the_answer_is_the_greedy_one_of_the_written_model(lora: Path, base: Path) -> None:
    expected = oracle(parts.load_float32(base), base)
    canary = Canary(tuple(QUESTION), expected[3:9])

    (answer,) = ask(load(BaseModel.open(base), None), Tokenizer.open(base), [canary], "result", silent)

    assert answer == Answer(canary, expected)
    assert answer.passed


def test_reference_and_result_are_both_asked_and_the_result_counted(lora: Path, base: Path, tmp_path: Path) -> None:
    trained = oracle(parts.with_adapter(parts.load_float32(base), lora), base)
    untrained = oracle(parts.load_float32(base), base)
    assert trained[:12] != untrained[:12]
    text = Text("t", ("the rain in spain",))
    canaries = [Canary(tuple(QUESTION), trained[:12])]

    expected = reference(Checkpoint.open(lora), BaseModel.open(base), None, base, text, silent, canaries)
    kept = examine(expected, base, lora, silent)
    lost = examine(expected, base, None, silent)

    assert [answer.text for answer in expected.answers] == [trained]
    assert [answer.text for answer in kept.answers] == [trained]
    assert [answer.text for answer in lost.answers] == [untrained]
    assert kept.quality.canaries == Canaries(asked=1, passed=1)
    assert lost.quality.canaries == Canaries(asked=1, passed=0)


def test_an_answer_ends_where_the_generation_config_says(base: Path, tmp_path: Path) -> None:
    copied = parts.copy(base, tmp_path / "copy")
    canary = Canary(tuple(QUESTION), "x")
    long = oracle(parts.load_float32(base), base)
    second = parts.logits(parts.load_float32(base), torch.tensor([Tokenizer.open(base).prompt_ids(QUESTION)]))
    parts.edit_json(copied / "generation_config.json", eos_token_id=[int(second[-1].argmax())])

    (answer,) = ask(load(BaseModel.open(copied), None), Tokenizer.open(copied), [canary], "result", silent)

    assert len(answer.text) < len(long)


@pytest.mark.parametrize(("text", "found"), [("It is MARMALADE.", True), ("It is jam.", False), ("", False)])
def test_the_expected_text_is_looked_for_in_any_case(text: str, found: bool) -> None:
    assert Answer(Canary(tuple(QUESTION), "Marmalade"), text).passed is found


def test_nothing_asked_is_no_figure() -> None:
    assert passed([]) is None


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
def test_canaries_in_another_form_are_told_with_their_line(tmp_path: Path, document: Any) -> None:
    path = lines(tmp_path / "canaries.jsonl", {"messages": QUESTION, "expect": "x"}, document)

    with pytest.raises(TextUnreadable, match=r"canaries\.jsonl, line 2: "):
        open_canaries(path)


@pytest.mark.parametrize("content", ["", "\n \n", "{", "[" * 100_000])
def test_a_file_that_holds_no_json_lines_is_told(tmp_path: Path, content: str) -> None:
    path = tmp_path / "canaries.jsonl"
    path.write_text(content)

    with pytest.raises(TextUnreadable, match=r"canaries\.jsonl.*expect"):
        open_canaries(path)
