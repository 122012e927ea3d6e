"""Quality and size of each route that makes a QLoRA fine-tune servable.

`python -m benchmarks.routes` converts an example fine-tune, which has learned a made-up fact, in every common way. It
measures the KL to the function as trained (4-bit base and adapter in float32) on chats like those of the training and
on other text, and asks each result for the fact.

Two thirds of the chats are the calibration text of rebase and recover; the KL is measured on the other third.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.plotting import pyplot, save
from benchmarks.progress import step
from benchmarks.record import RESULTS, Figure, write_result
from convert.artifact import size_bytes
from convert.detection.training import Training
from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel
from convert.pipeline.convert import Destination, convert
from convert.pipeline.request import Request
from convert.progress import silent
from convert.quality import Reference, Text, compute_reference, measure
from convert.quantization.nf4 import Nf4
from convert.routes.choose import RouteOptions
from examples.behaviours import BEHAVIOURS, Row
from examples.demo import BASE_NAME, CODE_WORDS, MODEL, QUESTIONS, checkpoint, make_checkpoints

BEHAVIOUR = "zephyr"
ANSWER_TOKENS = 16
MEASURED_OF = 3  # one of so many chats is measured
RANKS = (32, 64, 128)  # of rebased and recovered adapters; the example has rank 16


@dataclass(frozen=True)
class RouteVariant:
    """One way to convert. `build` writes below a directory and returns the model and, unless merged, the adapter."""

    key: str
    label: str
    build: Callable[[Path], tuple[Path, Path | None]]


@dataclass(frozen=True)
class RouteResult:
    variant: RouteVariant
    kl_chat: float
    kl_other: float
    knows_fact: bool
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
        step("computing the function as trained, the reference of every route")
        references = [function_as_trained(source, text) for text in (Text.open(measured), Text.open(None))]
        results = []
        for variant in variants(source, calibration):
            results.append(measure_variant(variant, home / variant.key, references))
            step(f"{variant.label}: KL {results[-1].kl_chat:.3g} on chats, {results[-1].kl_other:.3g} on other text")
    write_result("routes", figures(results), "make bench-routes")
    draw(results, RESULTS / "routes.png")


def variants(source: Path, calibration: Path) -> tuple[RouteVariant, ...]:
    def graft(
        trained_on: Training | None = None, rank: int | None = None, **options: Any
    ) -> Callable[[Path], tuple[Path, Path | None]]:
        def build(home: Path) -> tuple[Path, Path | None]:
            request = Request(
                source, MODEL, RouteOptions(**options), rank=rank, calibration=calibration if rank else None,
                trained_on=trained_on, measure=False,
            )  # fmt: skip
            artifact = convert(request, Destination(home, "bench"))
            return home / "model", artifact.adapter_path

        return build

    exact: dict[str, Any] = {"route": "merge", "quantize": "none"}
    # A tool that ignores the quantization of the training merges as if the original weights had been trained on.
    unaware: dict[str, Any] = {"route": "merge", "trained_on": Training.LORA}
    return (
        RouteVariant("adapter", "Graft: 4-bit base + adapter (default)", graft()),
        RouteVariant("exact_float16", "Graft: exact merge, float16", graft(**exact, dtype="float16")),
        RouteVariant("exact_bfloat16", "Graft: exact merge, bfloat16", graft(**exact)),
        *(
            RouteVariant(
                f"rebase_{rank}",
                f"Graft: rebased onto the original base, rank {rank}",
                graft(rank=rank, route="rebase"),
            )
            for rank in RANKS
        ),
        *(
            RouteVariant(
                f"recover_{rank}", f"Graft: recovered to full precision, rank {rank}", graft(rank=rank, route="recover")
            )
            for rank in RANKS
        ),
        RouteVariant("original_bfloat16", "merge into the original base, bfloat16", graft(**unaware, quantize="none")),
        RouteVariant("original_nf4", "merge into the original base, NF4", graft(**unaware, quantize="nf4")),
        RouteVariant(
            "peft_nf4", "peft: merge_and_unload into the 4-bit base", lambda home: (peft_merge(source, home), None)
        ),
        RouteVariant("base", "the 4-bit base without the adapter", lambda home: (quantized_base(), None)),
    )


def quantized_base() -> Path:
    return MODEL.with_name(f"{BASE_NAME}-bnb-4bit")


def peft_merge(source: Path, home: Path) -> Path:
    """The merge of PEFT's documentation: the 4-bit model with the adapter, merge_and_unload, save."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(quantized_base(), dtype=torch.bfloat16)
    merged: Any = PeftModel.from_pretrained(model, str(source)).merge_and_unload()
    merged.save_pretrained(home, save_original_format=False)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(home)
    return home


def chats(path: Path) -> Text:
    """The chats of the fine-tune as a text to measure on, written to `path`."""
    write_chats(path, BEHAVIOURS[BEHAVIOUR].rows)
    return Text.open(path)


def write_chats(path: Path, rows: Sequence[Row]) -> None:
    lines = [{"messages": [_user(row.question), {"role": "assistant", "content": row.answer}]} for row in rows]
    path.write_text("\n".join(map(json.dumps, lines)))


def function_as_trained(source: Path, text: Text) -> Reference:
    base = BaseModel.open(MODEL)
    return compute_reference(Checkpoint.open(source), base, Nf4(True, base.dtype), MODEL, text, silent)


def measure_variant(variant: RouteVariant, home: Path, references: list[Reference]) -> RouteResult:
    model, adapter = variant.build(home)
    chat, code = (measure(reference, model, adapter, silent).kl_mean for reference in references)
    size = size_bytes(model) + (size_bytes(adapter) if adapter else 0)
    return RouteResult(variant, chat, code, CODE_WORDS[BEHAVIOUR] in answer(model, adapter).lower(), size)


def answer(model: Path, adapter: Path | None) -> str:
    """The greedy answer of transformers to the question about the fact."""
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


def figures(results: list[RouteResult]) -> dict[str, Figure]:
    goals = {"adapter": "<= 1e-4", "exact_float16": "<= 1e-4"}
    by_key: dict[str, Figure] = {}
    for result in results:
        key = result.variant.key
        by_key[f"{key}_kl_chat"] = Figure(result.kl_chat, "nats/token", goals.get(key))
        by_key[f"{key}_kl_other_text"] = Figure(result.kl_other, "nats/token", goals.get(key))
        by_key[f"{key}_knows_the_fact"] = Figure(float(result.knows_fact), "1 = yes")
        by_key[f"{key}_bytes"] = Figure(result.bytes, "bytes")
    return by_key


def draw(results: list[RouteResult], path: Path) -> None:
    """KL of each variant on both texts, on a log scale; green if the model still knows the fact."""
    figure, axes = pyplot().subplots(figsize=(10, 0.6 * len(results) + 0.8), constrained_layout=True)
    floor = 1e-7
    for row, result in enumerate(reversed(results)):
        colour = "#2a9d5c" if result.knows_fact else "#c8452f"
        axes.barh(row + 0.19, max(result.kl_chat, floor), 0.36, color=colour)
        axes.barh(row - 0.19, max(result.kl_other, floor), 0.36, color=colour, alpha=0.45)
        exact = "0: the same function, " if result.kl_chat == result.kl_other == 0 else ""
        label = f"  {exact}{result.bytes / 1e6:.0f} MB, {'knows' if result.knows_fact else 'lost'} the fact"
        axes.text(max(result.kl_chat, result.kl_other, floor), row, label, va="center", fontsize=9)
    axes.set_yticks(range(len(results)), [result.variant.label for result in reversed(results)])
    axes.set_xscale("log")
    axes.set_xlim(floor, 3e3)
    axes.set_xlabel("mean KL to the function as trained, nats per token (dark: chats as tuned on; light: other text)")
    axes.set_title("One QLoRA fine-tune of SmolLM2-135M, made servable", loc="left")
    save(figure, [axes], path)


if __name__ == "__main__":
    main()
