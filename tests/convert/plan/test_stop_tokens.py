"""What ends an answer, as transformers reads it in the written files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessor

from convert.artifact import Artifact, Golden
from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel
from convert.plan.conversion_plan import OutputFormat, plan_model
from convert.plan.stop_tokens import open_tokenizer, shared_base_notes
from tests.convert import parts
from tests.convert.cli.test_cli import invoke
from tests.convert.plan.test_side_files import written

EOS, IM_END = 1, 3
CHAT = [{"role": "user", "content": "the rain"}, {"role": "assistant", "content": "in spain"}]


@pytest.fixture(scope="module")
def chat_checkpoint(lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tune in ChatML of a base whose answers end with </s>; its tokenizer still calls that the EOS."""
    checkpoint = parts.copy(lora, tmp_path_factory.mktemp("chat") / "checkpoint")
    parts.save_tokenizer(checkpoint, tokens=parts.CHATML_TOKENS, template=parts.CHATML)
    return checkpoint


@pytest.fixture(scope="module")
def plain_base(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with the same token ids, and without a chat template."""
    copied = parts.copy(base, tmp_path_factory.mktemp("plain") / "base")
    (copied / "chat_template.jinja").unlink()
    parts.save_tokenizer(copied, tokens=parts.CHATML_TOKENS, template=None)
    return copied


class Forced(LogitsProcessor):  # type: ignore[misc]
    """The third token of every answer is `token`."""

    def __init__(self, token: int, prompt: int) -> None:
        self.token, self.prompt = token, prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        third = input_ids.shape[1] == self.prompt + 2
        scores[:, [EOS, IM_END]] = -torch.inf
        return scores.index_fill(1, torch.tensor([self.token]), torch.inf) if third else scores


def answer_length(directory: Path, token: int) -> int:
    """Of transformers, which reads every setting from the directory."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    processor = Forced(token, parts.PROMPT.shape[1])
    generated = model.generate(parts.PROMPT, max_new_tokens=9, do_sample=False, logits_processor=[processor])
    return int(generated.shape[1] - parts.PROMPT.shape[1])


def stop_ids(path: Path) -> set[int]:
    ids = json.loads(path.read_text())["eos_token_id"]
    return set(ids if isinstance(ids, list) else [ids])


def notes_of(checkpoint: Path, base: Path) -> str:
    plan = plan_model(BaseModel.open(base), OutputFormat("original", None), Checkpoint.open(checkpoint))
    return "\n".join(plan.notes)


def test_what_the_template_ends_an_answer_with_stops_transformers(
    chat_checkpoint: Path, plain_base: Path, tmp_path: Path
) -> None:
    out = written(chat_checkpoint, plain_base, tmp_path / "out")

    assert answer_length(out, IM_END) == 3
    assert answer_length(out, EOS) == 3
    assert answer_length(plain_base, IM_END) == 9


@pytest.mark.parametrize("has_generation_config", [True, False])
def test_it_is_named_in_every_file_that_engines_read(
    chat_checkpoint: Path, plain_base: Path, tmp_path: Path, has_generation_config: bool
) -> None:
    copied = parts.copy(plain_base, tmp_path / "base")
    if not has_generation_config:
        (copied / "generation_config.json").unlink()

    out = written(chat_checkpoint, copied, tmp_path / "out")

    assert set(GenerationConfig.from_pretrained(out).eos_token_id) == {IM_END, EOS}
    assert stop_ids(out / "config.json") == {IM_END, EOS}
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", IM_END)
    assert tokenizer.chat_template == parts.CHATML
    assert tokenizer.decode([50, EOS, IM_END, 51], skip_special_tokens=True) == tokenizer.decode([50, 51])
    assert "'<|im_end|>' (3) ends an answer" in notes_of(chat_checkpoint, copied)


def test_an_eos_that_the_template_or_the_tokenizer_writes_stays_the_one_of_training(
    chat_checkpoint: Path, plain_base: Path, tmp_path: Path
) -> None:
    copied = parts.copy(chat_checkpoint, tmp_path / "checkpoint")
    (copied / "chat_template.jinja").write_text(parts.CHATML + "{{ eos_token }}")

    out = written(copied, plain_base, tmp_path / "out")

    assert AutoTokenizer.from_pretrained(out).eos_token == "</s>"
    assert stop_ids(out / "generation_config.json") == {IM_END, EOS}


def test_another_eos_of_the_checkpoints_tokenizer_is_a_stop_token_everywhere(
    lora: Path, base: Path, tmp_path: Path
) -> None:
    copied = parts.copy(lora, tmp_path / "checkpoint")
    parts.save_tokenizer(copied, eos="<s>")

    out = written(copied, base, tmp_path / "out")

    assert AutoTokenizer.from_pretrained(out).eos_token_id == 0
    assert stop_ids(out / "generation_config.json") == stop_ids(out / "config.json") == {0, EOS}


def test_golden_answers_and_the_manifest_have_it(chat_checkpoint: Path, plain_base: Path, out: Path) -> None:
    result = invoke("run", chat_checkpoint, "--base", plain_base, "--out", out, "--quantize", "none")

    assert result.exit_code == 0
    assert "note" in result.stdout
    golden = Golden.model_validate_json((out / "golden.json").read_bytes())
    assert set(golden.stop_token_ids) == {IM_END, EOS}
    assert all(chat.rendered.endswith("<|im_end|>\n<|im_start|>assistant\n") for chat in golden.chats)
    assert any("'<|im_end|>' (3) ends an answer" in note for note in Artifact.open(out).manifest.notes)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (
            parts.CHATML.replace("<|im_end|>", "###"),
            r"ends an answer with '###', which the tokenizer splits into 3 tokens",
        ),
        (parts.TEMPLATE, r"ignores add_generation_prompt, so that a server does not write '<\|assistant\|>' before"),
        ("{{ 1 / 0 }}", "can't be derived from the chat template.*division"),
        ("{{ messages[0]['content'] + 7 }}", "can't be derived"),
        ("{{ messages[0]['content'] }}", "leaves out the assistant's answers"),
        (parts.CHATML, ""),
    ],
)
def test_a_template_that_engines_cannot_follow_is_noted(base: Path, tmp_path: Path, template: str, says: str) -> None:
    directory = parts.copy(base, tmp_path / "base")
    parts.save_tokenizer(directory, tokens=parts.CHATML_TOKENS, template=template, eos="<|im_end|>")
    parts.edit_json(directory / "generation_config.json", eos_token_id=IM_END)

    notes = shared_base_notes(BaseModel.open(directory))

    assert len(notes) == bool(says)
    assert not says or re.search(says, notes[0])


def test_a_shared_base_that_does_not_stop_is_noted(plain_base: Path, tmp_path: Path) -> None:
    copied = parts.copy(plain_base, tmp_path / "base")
    (copied / "chat_template.jinja").write_text(parts.CHATML)

    (note,) = shared_base_notes(BaseModel.open(copied))

    assert "'<|im_end|>' ends an answer by the base's chat template, and is no stop token" in note


def test_text_is_rendered_with_the_template_that_the_fine_tune_used(
    chat_checkpoint: Path, plain_base: Path, tmp_path: Path
) -> None:
    """The tokenizer of the one and the template of the other: none of the two directories has both."""
    templated = parts.copy(plain_base, tmp_path / "base")
    (templated / "chat_template.jinja").write_text(parts.CHATML)
    bare = parts.copy(chat_checkpoint, tmp_path / "checkpoint")
    (bare / "chat_template.jinja").unlink()

    tokenizer = open_tokenizer(Checkpoint.open(bare), BaseModel.open(templated))

    expected = AutoTokenizer.from_pretrained(chat_checkpoint).apply_chat_template(CHAT, tokenize=True)["input_ids"]
    assert tokenizer.ids(CHAT) == expected
