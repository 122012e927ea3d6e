from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.artifact import Golden
from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel
from convert.inputs.chat.tokenizer import Tokenizer
from convert.progress import silent
from convert.quality import (
    Canary,
    Examination,
    Reference,
    Text,
    collect_golden,
    compute_reference,
    examine,
    write_golden,
)
from convert.quality.golden import golden_bytes
from convert.quality.tokenized_text import _pieces
from tests.convert import parts

CANARY = Canary(({"role": "user", "content": "the rain?"},), "spain")


@pytest.fixture(scope="module")
def expected(lora: Path, base: Path) -> Reference:
    """Of the default text: 12 rows, which are cut until there are 32 prompts."""
    return compute_reference(Checkpoint.open(lora), BaseModel.open(base), None, base, Text.open(None), silent, [CANARY])


@pytest.fixture(scope="module")
def examination(expected: Reference, base: Path, lora: Path) -> Examination:
    return examine(expected, base, lora, silent)


@pytest.fixture(scope="module")
def separate(expected: Reference, examination: Examination, base: Path) -> Golden:
    return collect_golden(expected, examination, base, separate=True)


def token_log_probs(model: Any, ids: tuple[int, ...]) -> list[float]:
    """By transformers and peft: log-probability of every token but the first."""
    log_probs = parts.logits(model, torch.tensor([ids])).log_softmax(-1)
    return [float(log_probs[position, token]) for position, token in enumerate(ids[1:])]


def test_there_are_32_prompts_of_at_most_48_tokens(separate: Golden) -> None:
    lengths = [len(prompt.token_ids) for prompt in separate.prompts]

    assert len(lengths) == 32
    assert max(lengths) <= 48
    assert min(lengths) >= 8


def test_log_probabilities_are_those_of_peft_and_of_the_base(separate: Golden, base: Path, lora: Path) -> None:
    alone = parts.load_float32(base)
    for prompt in separate.prompts[::5]:
        assert prompt.base == pytest.approx(token_log_probs(alone, prompt.token_ids), abs=2e-5)
    adapted = parts.with_adapter(alone, lora)
    for prompt in separate.prompts[::5]:
        assert prompt.reference == pytest.approx(token_log_probs(adapted, prompt.token_ids), abs=2e-5)
        assert prompt.result == pytest.approx(prompt.reference, abs=2e-5)


def test_the_result_is_the_written_model_not_the_reference(expected: Reference, base: Path) -> None:
    lost = collect_golden(expected, examine(expected, base, None, silent), base, separate=False)

    alone = parts.load_float32(base)
    assert all(prompt.base is None for prompt in lost.prompts)
    assert lost.prompts[0].result == pytest.approx(token_log_probs(alone, lost.prompts[0].token_ids), abs=2e-5)
    assert lost.prompts[0].result != pytest.approx(lost.prompts[0].reference, abs=1e-2)


def test_many_rows_give_the_prompts_without_being_cut(lora: Path, base: Path) -> None:
    text = Text("t", tuple(f"{number} the rain in spain stays mainly in the plain" * 2 for number in range(70)))
    expected = compute_reference(Checkpoint.open(lora), BaseModel.open(base), None, base, text, silent)

    prompts = collect_golden(expected, examine(expected, base, lora, silent), base, separate=True).prompts

    tokenizer = Tokenizer.open(base)
    assert len(prompts) == 32
    assert {tokenizer.text(prompt.token_ids).split()[0] for prompt in prompts} == {str(i * 70 // 32) for i in range(32)}
    assert not expected.tokens.pieces


def test_a_text_too_short_for_32_prompts_gives_what_it_has(lora: Path, base: Path) -> None:
    expected = compute_reference(
        Checkpoint.open(lora), BaseModel.open(base), None, base, Text("t", ("the rain",)), silent
    )

    prompts = collect_golden(expected, examine(expected, base, lora, silent), base, separate=True).prompts

    assert len(prompts) == 1


def test_chats_are_rendered_up_to_the_answer(separate: Golden) -> None:
    chats = {chat.rendered: chat.messages for chat in separate.chats}

    assert len(chats) == 7  # 4 of the text, the canary, 2 of our own
    assert "<|user|>What is the difference between a comet and an asteroid?" in chats
    assert "<|user|>the rain?" in chats
    assert all(messages[-1]["role"] == "user" for messages in chats.values())


def test_canaries_and_stop_tokens_are_in_it(separate: Golden, base: Path, tmp_path: Path) -> None:
    assert separate.canaries == (CANARY.golden,)
    assert separate.stop_token_ids == (1,)

    copied = parts.copy(base, tmp_path / "copy")
    parts.edit_json(copied / "generation_config.json", eos_token_id=[5, 1, 5])
    assert Tokenizer.open(copied).stop_ids == (5, 1)
    (copied / "generation_config.json").unlink()
    parts.edit_json(copied / "config.json", eos_token_id=7)
    assert Tokenizer.open(copied).stop_ids == (7,)
    parts.edit_json(copied / "config.json", eos_token_id=...)
    assert Tokenizer.open(copied).stop_ids == (1,)


def test_the_same_input_gives_the_same_bytes(
    separate: Golden, expected: Reference, base: Path, lora: Path, tmp_path: Path
) -> None:
    again = collect_golden(expected, examine(expected, base, lora, silent), base, separate=True)
    sha = write_golden(tmp_path / "golden.json", again)

    content = (tmp_path / "golden.json").read_bytes()
    assert content == golden_bytes(separate)
    assert sha == hashlib.sha256(content).hexdigest()
    assert Golden.model_validate_json(content) == separate
    assert all(len(str(value).partition(".")[2]) <= 6 for value in json.loads(content)["prompts"][0]["result"])


def test_a_template_that_writes_the_date_gives_the_same_text_on_every_day(base: Path, tmp_path: Path) -> None:
    copied = parts.copy(base, tmp_path / "copy")
    template = (
        "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ date_string }}, {{ strftime_now('%Y') }}: {{ messages[0]['content'] }}"
    )
    (copied / "chat_template.jinja").write_text(template)

    rendered = Tokenizer.open(copied).render([{"role": "user", "content": "hi"}], prompt=True)

    assert rendered == "26 Jul 2024, 2024: hi"


def test_a_template_that_takes_one_message_only_gives_the_chats_it_takes(
    lora: Path, base: Path, tmp_path: Path
) -> None:
    copied = parts.copy(base, tmp_path / "copy")
    (copied / "chat_template.jinja").write_text(
        "{% if messages|length > 1 %}{{ raise_exception('one only') }}{% endif %}[{{ messages[0]['content'] }}]"
    )
    expected = compute_reference(
        Checkpoint.open(lora), BaseModel.open(copied), None, copied, Text("t", ("the rain in",)), silent
    )

    chats = collect_golden(expected, examine(expected, copied, lora, silent), copied, separate=True).chats

    assert [chat.rendered for chat in chats] == ["[What is the capital of France?]"]


def test_without_a_chat_template_there_are_no_chats(lora: Path, base: Path, tmp_path: Path) -> None:
    copied = parts.copy(base, tmp_path / "copy")
    (copied / "chat_template.jinja").unlink()
    row = [{"role": "user", "content": "the rain"}, {"role": "assistant", "content": "in spain"}]
    expected = compute_reference(Checkpoint.open(lora), BaseModel.open(copied), None, copied, Text("t", (row,)), silent)

    assert collect_golden(expected, examine(expected, copied, lora, silent), copied, separate=True).chats == ()
    assert Tokenizer.open(copied).text(expected.tokens.measured[0][0][1:].tolist()).endswith("assistant: in spain")


def test_the_pieces_of_a_row_are_the_row_each_behind_its_leading_special_token() -> None:
    row = [0, *range(10, 130)]

    length, pieces = _pieces([row, row[1:41]], frozenset({0}), 10)

    of_first = [piece for piece in pieces if piece[0] == 0]
    rejoined = row[:length] + [token for piece in of_first for token in piece[1:]]
    assert rejoined == row[: len(rejoined)]
    assert len(row) - len(rejoined) < 8
    assert len(pieces) == 10
    assert {len(piece) for piece in of_first[:-1]} == {length}
