"""Canaries: questions whose answers show whether the result still knows what the fine-tune taught."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.artifact import Canaries, GoldenCanary
from convert.errors import QualityGateFailed, TextUnreadable
from convert.inputs.chat.tokenizer import Message, Tokenizer
from convert.progress import Progress
from convert.quality.text import json_lines, messages_of

ANSWER_TOKENS = 48

_EXPECTED = '{"messages": [{"role": "user", "content": "…"}, …], "expect": "…"}'


@dataclass(frozen=True)
class Canary:
    """A question, and the text that its answer must contain, in upper or lower case."""

    messages: tuple[Message, ...]
    expect: str

    @property
    def golden(self) -> GoldenCanary:
        return GoldenCanary(messages=self.messages, expect=self.expect)


@dataclass(frozen=True)
class Answer:
    """A model's greedy answer to a canary, of at most ANSWER_TOKENS tokens."""

    canary: Canary
    text: str

    @property
    def passed(self) -> bool:
        return self.canary.expect.casefold() in self.text.casefold()


def open_canaries(path: Path) -> tuple[Canary, ...]:
    """Read a JSON lines file of {"messages": […], "expect": "…"}. Raises TextUnreadable."""
    return tuple(_canary(document, where) for where, document in json_lines(path, _EXPECTED))


def count_passed(answers: Sequence[Answer], as_trained: Sequence[Answer]) -> Canaries | None:
    """The counts for the manifest; None where nothing was asked. `as_trained`: answers of the function as trained."""
    if not answers:
        return None
    passed, passed_as_trained = (sum(answer.passed for answer in each) for each in (answers, as_trained))
    return Canaries(asked=len(answers), passed=passed, passed_as_trained=passed_as_trained)


def require_passed(as_trained: Sequence[Answer]) -> None:
    """Raises QualityGateFailed where the function as trained does not answer a canary: then no result can."""
    failed = [answer for answer in as_trained if not answer.passed]
    if failed:
        listed = "".join(
            f"\n  - {answer.canary.expect!r} is not in: {' '.join(answer.text.split())}" for answer in failed
        )
        raise QualityGateFailed(
            f"The model as trained, before any conversion, fails {len(failed)} of {len(as_trained)} canaries itself, "
            f"so that no route can keep them:{listed}\nNothing was published. Correct what --canaries expects, or "
            "train longer."
        )


def ask(
    model: Any, tokenizer: Tokenizer, canaries: Sequence[Canary], model_name: str, progress: Progress
) -> tuple[Answer, ...]:
    """Greedy answers of a transformers model. Each canary is a chat of its own. `model_name` is for the progress."""
    return tuple(_answers(model, tokenizer, canaries, model_name, progress))


def _answers(
    model: Any, tokenizer: Tokenizer, canaries: Sequence[Canary], model_name: str, progress: Progress
) -> Iterator[Answer]:
    for done, canary in enumerate(canaries, start=1):
        yield Answer(canary, _generate(model, tokenizer, canary))
        progress(f"asking {model_name}", done, len(canaries))


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
        raise TextUnreadable(f"{where}: expected {_EXPECTED}, with text in every place")
    if messages[-1]["role"] == "assistant":
        raise TextUnreadable(f"{where}: the last message is the assistant's own; end with the question it must answer")
    return Canary(tuple(messages), expect.strip())
