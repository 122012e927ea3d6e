"""Canaries: questions whose answers show at a glance whether what was taught is still there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.artifact import Canaries, GoldenCanary
from convert.errors import TextUnreadable
from convert.progress import Progress
from convert.quality.text import Message, json_lines, messages_of
from convert.quality.tokenizer import Tokenizer

ANSWER_TOKENS = 48

_FORM = '{"messages": [{"role": "user", "content": "…"}, …], "expect": "…"}'


@dataclass(frozen=True)
class Canary:
    """A question, and the text that its answer must hold, in any case."""

    messages: tuple[Message, ...]
    expect: str

    @property
    def golden(self) -> GoldenCanary:
        return GoldenCanary(messages=self.messages, expect=self.expect)


@dataclass(frozen=True)
class Answer:
    """What a model said to a canary, up to ANSWER_TOKENS tokens, always taking the likeliest."""

    canary: Canary
    text: str

    @property
    def passed(self) -> bool:
        return self.canary.expect.casefold() in self.text.casefold()


def open_canaries(path: Path) -> tuple[Canary, ...]:
    """Read a JSON lines file of {"messages": […], "expect": "…"}. Raises TextUnreadable."""
    return tuple(_canary(document, where) for where, document in json_lines(path, _FORM))


def passed(answers: Sequence[Answer]) -> Canaries | None:
    """The count for the manifest; None where nothing was asked."""
    if not answers:
        return None
    return Canaries(asked=len(answers), passed=sum(answer.passed for answer in answers))


def ask(
    model: Any, tokenizer: Tokenizer, canaries: Sequence[Canary], what: str, progress: Progress
) -> tuple[Answer, ...]:
    """Greedy answers of a transformers model, each to a chat of its own."""
    return tuple(_answers(model, tokenizer, canaries, what, progress))


def _answers(
    model: Any, tokenizer: Tokenizer, canaries: Sequence[Canary], what: str, progress: Progress
) -> Iterator[Answer]:
    for done, canary in enumerate(canaries, start=1):
        yield Answer(canary, _generate(model, tokenizer, canary))
        progress(f"asking {what}", done, len(canaries))


def _generate(model: Any, tokenizer: Tokenizer, canary: Canary) -> str:
    import torch

    prompt = torch.tensor([tokenizer.prompt_ids(canary.messages)])
    stops = list(tokenizer.stop_ids)
    with torch.inference_mode():
        generated = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            eos_token_id=stops or None,
            pad_token_id=stops[0] if stops else 0,
        )
    return tokenizer.text(generated[0, prompt.shape[1] :].tolist())


def _canary(document: Any, where: str) -> Canary:
    messages = messages_of(document)
    expect = document.get("expect") if isinstance(document, dict) else None
    if not messages or not isinstance(expect, str) or not expect.strip():
        raise TextUnreadable(f"{where}: expected {_FORM}, with text in every place")
    if messages[-1]["role"] == "assistant":
        raise TextUnreadable(f"{where}: the last message is the assistant's own; end with the question it must answer")
    return Canary(tuple(messages), expect.strip())
