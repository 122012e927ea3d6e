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
from convert.quality.models.memory import Prompts
from convert.quality.models.streamed_model import StreamedModel
from convert.quality.text import json_lines, messages_of

ANSWER_TOKENS = 48

# Of all prompts of a batch together, with their padding: eager attention holds a square of each length for each head.
_BATCH_TOKENS = 2048

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
    model: StreamedModel, tokenizer: Tokenizer, canaries: Sequence[Canary], model_name: str, progress: Progress
) -> tuple[Answer, ...]:
    """Greedy answers. Each canary is a chat of its own. `model_name` is for the progress.

    Several are answered at a time, since every token reads the whole model.
    """
    prompts = [tokenizer.prompt_ids(canary.messages) for canary in canaries]
    texts: dict[int, str] = {}
    for batch in _batches(prompts):
        progress(f"asking {model_name}", len(texts), len(canaries))
        answer_ids = _generate(model, tokenizer.stop_ids, [prompts[number] for number in batch])
        texts |= {number: tokenizer.text(ids) for number, ids in zip(batch, answer_ids, strict=True)}
    if canaries:
        progress(f"asking {model_name}", len(canaries), len(canaries))
    return tuple(Answer(canary, texts[number]) for number, canary in enumerate(canaries))


def prompts_of(canaries: Sequence[Canary], tokenizer: Tokenizer) -> tuple[Prompts, ...]:
    """The batches in which canaries are asked."""
    prompts = [tokenizer.prompt_ids(canary.messages) for canary in canaries]
    return tuple(Prompts(len(batch), max(len(prompts[number]) for number in batch)) for batch in _batches(prompts))


def _batches(prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """The prompts' numbers, shortest first, in batches of at most _BATCH_TOKENS when padded to the longest."""
    batch: list[int] = []
    for number in sorted(range(len(prompts)), key=lambda number: len(prompts[number])):
        if batch and (len(batch) + 1) * len(prompts[number]) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _generate(model: StreamedModel, stops: Sequence[int], prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """The tokens of each answer, with the one that ended it."""
    import torch

    length, padding = max(map(len, prompts)), stops[0] if stops else 0
    ids = torch.tensor([[padding] * (length - len(prompt)) + list(prompt) for prompt in prompts])
    is_prompt = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        generated = model.generate(
            input_ids=ids,
            attention_mask=is_prompt,
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            eos_token_id=list(stops) or None,
            pad_token_id=padding,
        )
    for answer in generated[:, length:].tolist():
        end = next((number for number, token in enumerate(answer, start=1) if token in stops), None)
        yield answer[:end]


def _canary(document: Any, where: str) -> Canary:
    messages = messages_of(document)
    expect = document.get("expect") if isinstance(document, dict) else None
    if not messages or not isinstance(expect, str) or not expect.strip():
        raise TextUnreadable(f"{where}: expected {_EXPECTED}, with text in every place")
    if messages[-1]["role"] == "assistant":
        raise TextUnreadable(f"{where}: the last message is the assistant's own; end with the question it must answer")
    return Canary(tuple(messages), expect.strip())
