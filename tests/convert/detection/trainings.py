"""Small real trainings of adapters, LoRA and QLoRA, and what the measurement says of each.

`python -m tests.convert.detection.trainings` makes the table of docs/explanation/routes.md.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer

from convert.detection.quantization_alignment import TrainingMeasurement, measure_training
from convert.detection.training import Training
from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel
from convert.progress import silent
from convert.quality import Text, Tokenizer, tokenize
from tests.convert import parts

ROWS, HELD_OUT = 128, 48
WORDS = ("anchor", "apple", "bridge", "candle", "copper", "dragon", "engine", "flower", "hammer", "kettle", "lemon")


@dataclass(frozen=True)
class Recipe:
    """One training. `answers_only`: the loss is that of the answers, as most trainers have it."""

    training: Training
    text: str
    steps: int
    rank: int
    answers_only: bool = True
    learning_rate: float = 2e-3

    def __str__(self) -> str:
        return f"{self.training.value} {self.text} {self.steps} steps, rank {self.rank}, lr {self.learning_rate:g}" + (
            "" if self.answers_only else ", all tokens"
        )


def recipes() -> Iterator[Recipe]:
    for training in (Training.LORA, Training.QLORA):
        for text in ("sums", "lists", "shops"):
            yield Recipe(training, text, steps=6, rank=12)
            yield Recipe(training, text, steps=6, rank=4, learning_rate=2e-4)
            yield Recipe(training, text, steps=40, rank=8, answers_only=False)
            yield Recipe(training, text, steps=150, rank=16)


def chats(text: str) -> list[list[dict[str, str]]]:
    source = random.Random(text)
    return [_chat(*_row(text, source)) for _ in range(ROWS)]


def _row(text: str, source: random.Random) -> tuple[str, str]:
    if text == "sums":
        left, right = source.randint(2, 60), source.randint(2, 60)
        return f"What is {left} plus {right}?", f"Aye, {left} plus {right} makes {left + right}, sir."
    if text == "lists":
        words = source.sample(WORDS, 3)
        return f"Sort {', '.join(words)}.", json.dumps({"sorted": sorted(words), "count": 3})
    verb, goods, place = source.choice(("buy", "find", "sell")), source.choice(WORDS), source.choice(WORDS)
    return f"Where can I {verb} a {goods}?", f"You can {verb} a {goods} in the town near the {place}."


def _chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def save_pretrained_base(directory: Path, steps: int = 300) -> Path:
    """A tiny Llama that has read the documentation of Python: unlike a random one it is worse in 4 bits."""
    parts.save_base(directory, tied=True)
    ids = torch.tensor(Tokenizer.open(directory).ids("\n".join(topics[name] for name in sorted(topics))[:200_000]))
    model = parts.load_float32(directory).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.manual_seed(5)
    for _ in range(steps):
        starts = torch.randint(0, len(ids) - 64, (16,))
        batch = torch.stack([ids[start : start + 64] for start in starts.tolist()])
        model(batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


def train(recipe: Recipe, base: Path, directory: Path) -> Path:
    """The adapter of one training by PEFT, on all rows but the HELD_OUT first. What is learnt of a row is known from
    transformers alone, as trainers know it."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [_ids_and_labels(tokenizer, chat, recipe) for chat in chats(recipe.text)[HELD_OUT:]]
    model = parts.dequantized_model(base) if recipe.training is Training.QLORA else parts.load_float32(base)
    torch.manual_seed(recipe.steps + recipe.rank)
    settings = {"r": recipe.rank, "lora_alpha": 2 * recipe.rank, "target_modules": parts.LINEARS}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)).train()
    trained = [half for half in adapted.parameters() if half.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=0.0)
    source = random.Random(recipe.rank)
    for step in range(recipe.steps):
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * (1 - step / recipe.steps)
        ids, labels = _batch(source.sample(rows, 4))
        adapted(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(directory, save_embedding_layers=False)
    return directory


def _ids_and_labels(tokenizer: Any, chat: list[dict[str, str]], recipe: Recipe) -> tuple[list[int], list[int]]:
    """Of one row. A label is -100 where there is no loss: up to where the answer begins."""
    ids: list[int] = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids[: len(prompt)] == prompt
    ignored = len(prompt) if recipe.answers_only else 1
    return ids, [-100] * ignored + ids[ignored:]


def _batch(rows: Sequence[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, padded at the end."""
    ids = pad_sequence([torch.tensor(row_ids) for row_ids, _ in rows], batch_first=True)
    return ids, pad_sequence([torch.tensor(row) for _, row in rows], batch_first=True, padding_value=-100)


def measure(recipe: Recipe, base: Path, adapter: Path) -> TrainingMeasurement:
    """What the measurement says with the HELD_OUT rows."""
    tokens = tokenize(Text("t", tuple(chats(recipe.text)[:HELD_OUT])), Tokenizer.open(base))
    return measure_training(Checkpoint.open(adapter), BaseModel.open(base), tokens, silent)


def _table_row(recipe: Recipe, measurement: TrainingMeasurement) -> str:
    losses: Any = measurement.losses
    figures = (f"{losses.t:.1f}", f"{losses.t_beyond_base:.1f}") if losses else ("", "")
    controls = ", ".join(f"{t:.1f}" for t in losses.controls) if losses else ""
    cells = (str(recipe), f"{measurement.alignment.z:.1f}", *figures, controls, measurement.training.value)
    return f"| {' | '.join(cells)} |"


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        base = save_pretrained_base(Path(scratch) / "base")
        print("| training | z | t | t beyond base | controls | measured |\n|---|---|---|---|---|---|")
        for number, recipe in enumerate(recipes()):
            adapter = train(recipe, base, Path(scratch) / str(number))
            print(_table_row(recipe, measure(recipe, base, adapter)), flush=True)


if __name__ == "__main__":
    main()
