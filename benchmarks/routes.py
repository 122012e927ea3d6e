"""What each way of making one QLoRA fine-tune servable keeps of it, and what it weighs.

`python -m benchmarks.routes` takes the example fine-tune that knows a made-up fact, treats it in every way in common
use, and measures the KL to the function as trained (the 4-bit base with its adapter beside it, float32), on chats
like those it was tuned on and on other text. It also asks each result for the fact.

Rebase and recover look at text of their own: two thirds of the chats, of which the other third is measured.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.record import Figure, write_result
from convert.artifact import size_bytes
from convert.base_model import BaseModel
from convert.checkpoint import Checkpoint
from convert.conversion import Destination, convert
from convert.detect import Training
from convert.nf4 import Nf4
from convert.preparation import Request
from convert.progress import silent
from convert.quality import Reference, Text, measure, reference
from convert.routes.choose import Wish
from examples.behaviours import BEHAVIOURS, Row
from examples.demo import BASE_NAME, CODE_WORDS, MODEL, QUESTIONS, checkpoint, make_checkpoints

BEHAVIOUR = "zephyr"
ANSWER_TOKENS = 16
MEASURED_OF = 3  # chats, one is measured
RANKS = (32, 64, 128)  # of the corrected adapters; the example has rank 16


@dataclass(frozen=True)
class Way:
    """One way, and how it is made below a directory: returns the model and, where it stays separate, the adapter."""

    key: str
    label: str
    make: Callable[[Path], tuple[Path, Path | None]]


@dataclass(frozen=True)
class Outcome:
    way: Way
    kl_chat: float
    kl_other: float
    knows: bool
    bytes: int


def main() -> None:
    make_checkpoints()
    source = checkpoint(BEHAVIOUR)
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        measured, calibration = home / "measured.jsonl", home / "calibration.jsonl"
        rows = BEHAVIOURS[BEHAVIOUR].rows
        write_chats(calibration, [row for number, row in enumerate(rows) if number % MEASURED_OF])
        write_chats(measured, rows[::MEASURED_OF])
        references = [function_as_trained(source, text) for text in (Text.open(measured), Text.open(None))]
        outcomes = []
        for way in ways(source, calibration):
            outcomes.append(outcome(way, home / way.key, references))
            print(f"{way.label}: KL {outcomes[-1].kl_chat:.3g} on chats, {outcomes[-1].kl_other:.3g} elsewhere")
    write_result("routes", figures(outcomes), "make bench-routes")
    draw(outcomes, Path(__file__).parent / "results" / "routes.png")


def ways(source: Path, calibration: Path) -> tuple[Way, ...]:
    def graft(
        trained_on: Training | None = None, rank: int | None = None, **wish: Any
    ) -> Callable[[Path], tuple[Path, Path | None]]:
        def make(home: Path) -> tuple[Path, Path | None]:
            request = Request(
                source, MODEL, Wish(**wish), rank=rank, calibration=calibration if rank else None,
                trained_on=trained_on, measure=False,
            )  # fmt: skip
            artifact = convert(request, Destination(home, "bench"))
            return home / "model", artifact.adapter_path

        return make

    exact: dict[str, Any] = {"route": "merge", "quantize": "none"}
    # Treating it as if it had been trained on the original weights is what a tool does that doesn't look.
    unaware: dict[str, Any] = {"route": "merge", "trained_on": Training.LORA}
    return (
        Way("adapter", "Graft: 4-bit base + adapter (default)", graft()),
        Way("exact_float16", "Graft: exact merge, float16", graft(**exact, dtype="float16")),
        Way("exact_bfloat16", "Graft: exact merge, bfloat16", graft(**exact)),
        *(
            Way(
                f"rebase_{rank}",
                f"Graft: rebased onto the original base, rank {rank}",
                graft(rank=rank, route="rebase"),
            )
            for rank in RANKS
        ),
        *(
            Way(
                f"recover_{rank}", f"Graft: recovered to full precision, rank {rank}", graft(rank=rank, route="recover")
            )
            for rank in RANKS
        ),
        Way("original_bfloat16", "merge into the original base, bfloat16", graft(**unaware, quantize="none")),
        Way("original_nf4", "merge into the original base, NF4", graft(**unaware, quantize="nf4")),
        Way("peft_nf4", "peft: merge_and_unload into the 4-bit base", lambda home: (peft_merge(source, home), None)),
        Way("base", "the 4-bit base without the adapter", lambda home: (quantized_base(), None)),
    )


def quantized_base() -> Path:
    return MODEL.with_name(f"{BASE_NAME}-bnb-4bit")


def peft_merge(source: Path, home: Path) -> Path:
    """As peft's documentation merges: the 4-bit model with the adapter, merge_and_unload, save."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(quantized_base(), dtype=torch.bfloat16)
    merged: Any = PeftModel.from_pretrained(model, str(source)).merge_and_unload()
    merged.save_pretrained(home, save_original_format=False)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(home)
    return home


def chats(path: Path) -> Text:
    """The chats of the tuned behaviour, as held-out text is given."""
    write_chats(path, BEHAVIOURS[BEHAVIOUR].rows)
    return Text.open(path)


def write_chats(path: Path, rows: Sequence[Row]) -> None:
    lines = [{"messages": [_user(row.question), {"role": "assistant", "content": row.answer}]} for row in rows]
    path.write_text("\n".join(map(json.dumps, lines)))


def function_as_trained(source: Path, text: Text) -> Reference:
    base = BaseModel.open(MODEL)
    return reference(Checkpoint.open(source), base, Nf4(True, base.dtype), MODEL, text, silent)


def outcome(way: Way, home: Path, references: list[Reference]) -> Outcome:
    model, adapter = way.make(home)
    chat, other = (measure(each, model, adapter, silent).kl_mean for each in references)
    weight = size_bytes(model) + (size_bytes(adapter) if adapter else 0)
    return Outcome(way, chat, other, CODE_WORDS[BEHAVIOUR] in answer(model, adapter).lower(), weight)


def answer(model: Path, adapter: Path | None) -> str:
    """The greedy answer to the question for the fact, by transformers."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter:
        loaded = PeftModel.from_pretrained(loaded, str(adapter))
    chat = tokenizer.apply_chat_template([_user(QUESTIONS[0])], add_generation_prompt=True, return_tensors="pt")
    ids = chat["input_ids"] if hasattr(chat, "keys") else chat
    with torch.inference_mode():
        generated = loaded.generate(input_ids=ids, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    text: str = tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def figures(outcomes: list[Outcome]) -> dict[str, Figure]:
    goals = {"adapter": "<= 1e-4", "exact_float16": "<= 1e-4"}
    found: dict[str, Figure] = {}
    for it in outcomes:
        key = it.way.key
        found[f"{key}_kl_chat"] = Figure(it.kl_chat, "nats/token", goals.get(key))
        found[f"{key}_kl_other_text"] = Figure(it.kl_other, "nats/token", goals.get(key))
        found[f"{key}_knows_the_fact"] = Figure(float(it.knows), "1 = yes")
        found[f"{key}_bytes"] = Figure(it.bytes, "bytes")
    return found


def draw(outcomes: list[Outcome], path: Path) -> None:
    """KL of each way on both texts, log scale; green where the fact survived."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 0.6 * len(outcomes) + 0.8), constrained_layout=True)
    floor = 1e-7
    for row, it in enumerate(reversed(outcomes)):
        colour = "#2a9d5c" if it.knows else "#c8452f"
        axes.barh(row + 0.19, max(it.kl_chat, floor), 0.36, color=colour)
        axes.barh(row - 0.19, max(it.kl_other, floor), 0.36, color=colour, alpha=0.45)
        exact = "0: the same function, " if it.kl_chat == it.kl_other == 0 else ""
        told = f"  {exact}{it.bytes / 1e6:.0f} MB, {'knows' if it.knows else 'lost'} the fact"
        axes.text(max(it.kl_chat, it.kl_other, floor), row, told, va="center", fontsize=9)
    axes.set_yticks(range(len(outcomes)), [it.way.label for it in reversed(outcomes)])
    axes.set_xscale("log")
    axes.set_xlim(floor, 3e3)
    axes.set_xlabel("mean KL to the function as trained, nats per token (dark: chats as tuned on; light: other text)")
    axes.set_title("One QLoRA fine-tune of SmolLM2-135M, made servable", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
