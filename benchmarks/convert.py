"""Speed and memory of a merge compared with `cp` of the same bytes, and the loss of the exact route.

`python -m benchmarks.convert` writes a model of Llama-3.2-3B's shape with random weights and a LoRA of rank 16 on every
linear layer. Then the sides alternate: `cp` and fsync of the model, the merge onto the original weights, the merge onto
the NF4 base. Each run is a process of its own, and the order alternates, so that drift of the disk affects all sides.
All inputs are in the page cache where memory allows, and all earlier output is on the disk when the clock starts. A
warm-up turn is not counted. PEFT's load, merge and save run once. `other_processes` is the number of cores that other
processes used meanwhile, also for the kernel's writeback: a merge takes several times the processor time of `cp`, so a
busy machine slows it down more.

`cp` writes through the page cache, a merge writes with direct I/O. On a virtual machine whose host reclaims free
memory, `cp` has to get its pages again, which doubles its time. `fastest_cp_s` is its time without that.

The floor of the exact route's KL is the self-noise of bfloat16: the KL between the function as trained in float32 and
the same function as its trainer computes it (4-bit base and adapter by bitsandbytes and PEFT, in bfloat16). A KL below
twice that, or below 1e-4 nats, can't be distinguished from the trained model.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import llama3b
from benchmarks.alternation import alternating
from benchmarks.convert_side import sync_files
from benchmarks.plotting import pyplot, save
from benchmarks.process_usage import busy_seconds
from benchmarks.progress import step
from benchmarks.record import RESULTS, Figure, write_result
from benchmarks.routes import BEHAVIOUR, chats, function_as_trained, quantized_base
from convert.artifact import size_bytes
from convert.pipeline.convert import Destination, convert
from convert.pipeline.request import Request
from convert.progress import silent
from convert.quality import Reference, Text, measure
from convert.quantization.nf4 import BLOCK, Nf4
from convert.routes.choose import RouteOptions
from convert.write.blocks import rows_per_block
from examples.demo import MODEL, checkpoint, make_checkpoints

GRAFT_SIDES = ("original", "dequantized")
LABELS = {
    "cp": "cp + fsync",
    "original": "Graft: merge onto the original weights",
    "dequantized": "Graft: merge onto the NF4 base, dequantized",
    "peft": "PEFT: load, merge, save (original weights)",
}
ALLOWANCE_BYTES = 256_000_000
KL_FLOOR = 1e-4


@dataclass(frozen=True)
class Sample:
    """One run of one side; memory is counted above what the process held after all imports."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int = 0
    other_cores: float = 0.0  # used by other processes


@dataclass(frozen=True)
class Inputs:
    """The inputs of a merge: an adapter, and the base with original and with NF4 weights."""

    adapter: Path
    original: Path
    nf4: Path

    def base(self, side: str) -> Path:
        return self.nf4 if side == "dequantized" else self.original


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of every side but PEFT (default 5)")
    parser.add_argument(
        "--work", type=Path, default=Path("build"), help="a directory with 22 GB of free space (default build/)"
    )
    options = parser.parse_args()
    make_checkpoints()
    options.work.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work, prefix="bench-convert-") as directory:
        home = Path(directory)
        inputs = make_inputs(home)
        samples = run_sides(inputs, home / "out", options.rounds)
        figures = (
            speed_figures(samples) | memory_figures(samples, inputs) | {"nf4_dequantize_elements_per_s": nf4_speed()}
        )
    with tempfile.TemporaryDirectory() as directory:
        figures |= exactness_figures(Path(directory))
    write_result("convert", figures, "make bench-convert")
    draw(samples, inputs_budget=figures["budget_bytes"].value, path=RESULTS / "convert.png")


def make_inputs(home: Path) -> Inputs:
    step("writing a model of Llama-3.2-3B's shape, its NF4 form and an adapter")
    return Inputs(
        llama3b.save_adapter(home / "adapter"),
        llama3b.save_base(home / "original", MODEL),
        llama3b.save_base(home / "nf4", MODEL, Nf4()),
    )


def run_sides(inputs: Inputs, out: Path, rounds: int) -> dict[str, list[Sample]]:
    samples: dict[str, list[Sample]] = {side: [] for side in LABELS}
    order = ["cp", *GRAFT_SIDES]
    step("a warm-up turn, which is not counted")
    for side in order:
        run_side(side, inputs, out)
    for number, side in alternating(order, rounds):
        step(f"turn {number + 1} of {rounds}: {side}")
        samples[side].append(run_side(side, inputs, out))
    step("PEFT, once")
    samples["peft"].append(run_side("peft", inputs, out))
    return samples


def run_side(side: str, inputs: Inputs, out: Path) -> Sample:
    os.sync()
    began, busy, own = time.perf_counter(), busy_seconds(), children_seconds()
    sample = copy(inputs.original, out) if side == "cp" else in_process(side, inputs, out)
    other_cores = (busy_seconds() - busy - children_seconds() + own) / (time.perf_counter() - began)
    sample = replace(sample, other_cores=max(other_cores, 0.0))
    shutil.rmtree(out)
    usage = f"{sample.cpu_seconds:.1f} CPU-s, {sample.peak_bytes / 1e6:.0f} MB, others {sample.other_cores:.1f} cores"
    step(f"{side}: {sample.seconds:.1f} s, {usage}")
    return sample


def copy(source: Path, out: Path) -> Sample:
    began, cpu = time.perf_counter(), children_seconds()
    subprocess.run(["cp", "-r", source, out], check=True)
    sync_files(out)
    return Sample(time.perf_counter() - began, children_seconds() - cpu)


def in_process(side: str, inputs: Inputs, out: Path) -> Sample:
    words = [sys.executable, "-m", "benchmarks.convert_side", side, inputs.adapter, inputs.base(side), out]
    done = subprocess.run(list(map(str, words)), check=True, stdout=subprocess.PIPE)
    return Sample(**json.loads(done.stdout))


def children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def speed_figures(samples: dict[str, list[Sample]]) -> dict[str, Figure]:
    """Ratios of speeds, each between runs of the same turn."""

    def ratio(side: str) -> list[float]:
        return [copied.seconds / merged.seconds for copied, merged in zip(samples["cp"], samples[side], strict=False)]

    seconds = {f"{side}_s": Figure.of([run.seconds for run in runs], "s") for side, runs in samples.items()}
    cpu = {f"{side}_cpu_s": Figure.of([run.cpu_seconds for run in runs], "CPU-s") for side, runs in samples.items()}
    copied = statistics.median(run.seconds for run in samples["cp"])
    fastest = min(run.seconds for run in samples["cp"])
    merged = statistics.median(run.seconds for run in samples["original"])
    return {
        "merge_w16_vs_cp": Figure.of(ratio("original"), "speed ratio", ">= 0.8"),
        "merge_dq_vs_cp": Figure.of(ratio("dequantized"), "speed ratio", ">= 0.6"),
        "merge_w16_vs_fastest_cp": Figure(fastest / merged, "speed ratio"),
        "peft_vs_cp": Figure(copied / samples["peft"][0].seconds, "speed ratio"),
        "fastest_cp_s": Figure(fastest, "s"),
        "other_processes": Figure.of([run.other_cores for runs in samples.values() for run in runs], "cores"),
        **seconds,
        **cpu,
    }


def memory_figures(samples: dict[str, list[Sample]], inputs: Inputs) -> dict[str, Figure]:
    """The budget: the adapter, twice the largest tensor as stored (the embedding), and 256 MB."""
    largest = llama3b.VOCABULARY * llama3b.HIDDEN * 2
    budget = size_bytes(inputs.adapter) + 2 * largest + ALLOWANCE_BYTES
    peaks = {side: [float(run.peak_bytes) for run in samples[side]] for side in (*GRAFT_SIDES, "peft")}
    return {
        "budget_bytes": Figure(budget, "bytes"),
        "merge_rss_over_budget": Figure.of([peak / budget for peak in peaks["original"]], "peak / budget", "<= 1"),
        "merge_dq_rss_over_budget": Figure.of(
            [peak / budget for peak in peaks["dequantized"]], "peak / budget", "<= 1"
        ),
        "merge_rss_bytes": Figure.of(peaks["original"], "bytes"),
        "merge_dq_rss_bytes": Figure.of(peaks["dequantized"], "bytes"),
        "peft_rss_bytes": Figure.of(peaks["peft"], "bytes"),
    }


def nf4_speed() -> Figure:
    """Elements per second from NF4 to float32, in blocks of rows on one thread, as in a merge."""
    import torch

    torch.set_num_threads(1)
    shape = llama3b.LINEARS["mlp.up_proj"]
    settings, rows = Nf4(), rows_per_block(shape)
    parts = settings.quantize("m", torch.randn(shape))
    codes, scales = parts["m.weight"], settings.scales("m", parts)
    samples = []
    for _ in range(5):
        began = time.perf_counter()
        for row in range(0, shape[0], rows):
            count = min(rows, shape[0] - row)
            first, last = row * shape[1], (row + count) * shape[1]
            settings.dequantize_block(
                codes[first // 2 : last // 2], scales[first // BLOCK : last // BLOCK], (count, shape[1])
            )
        samples.append(shape[0] * shape[1] / (time.perf_counter() - began))
    return Figure.of(samples, "elements/s")


def exactness_figures(home: Path) -> dict[str, Figure]:
    """The exact route on a real QLoRA fine-tune, on its chats and on other text."""
    source = checkpoint(BEHAVIOUR)
    out = home / "exact"
    convert(Request(source, MODEL, RouteOptions("merge", "none"), measure=False), Destination(out, "bench"))
    figures, ratios = {}, []
    for name, text in {"chat": chats(home / "chat.jsonl"), "other_text": Text.open(None)}.items():
        reference = function_as_trained(source, text)
        exact = measure(reference, out / "model", None, silent).kl_mean
        noise = self_noise(reference, source)
        ratios.append(exact / max(KL_FLOOR, 2 * noise))
        figures[f"exact_kl_{name}"] = Figure(exact, "nats/token")
        figures[f"bf16_self_noise_{name}"] = Figure(noise, "nats/token")
        step(f"exact route on {name}: KL {exact:.2g}, self-noise {noise:.2g}")
    return {"exact_kl_over_floor": Figure(max(ratios), "ratio, the worse text", "<= 1"), **figures}


def self_noise(reference: Reference, source: Path) -> float:
    """Mean KL from the function as trained in float32 to the same one in bfloat16, as its trainer computes it."""
    import torch

    divergences, start = [], 0
    for trained in trainer_log_probs(reference, source):
        stop = start + len(trained)
        with torch.inference_mode():
            reference64 = torch.cat(list(reference.logits.log_probs(start, stop))).double()
        start, trained64 = stop, trained.double()
        divergences.append((reference64.exp() * (reference64 - trained64)).sum(-1).clamp_min(0))
    return float(torch.cat(divergences).mean())


def trainer_log_probs(reference: Reference, source: Path) -> Iterator[Any]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(quantized_base(), dtype=torch.bfloat16, attn_implementation="eager")
    adapted = PeftModel.from_pretrained(model, str(source)).to(torch.bfloat16).eval()
    with torch.inference_mode():
        for row in reference.tokens.measured:
            yield torch.log_softmax(adapted(row, use_cache=False).logits[0, :-1].float(), dim=-1)


def draw(samples: dict[str, list[Sample]], inputs_budget: float, path: Path) -> None:
    """Left: time of every run. Right: peak memory, and the budget."""
    colours = {"cp": "0.55", "original": "#2a9d5c", "dequantized": "#3b6fb6", "peft": "#c8452f"}
    figure, (times, memory) = pyplot().subplots(1, 2, figsize=(12, 3.6), constrained_layout=True, sharey=True)
    for row, side in enumerate(reversed(LABELS)):
        runs = samples[side]
        middle = statistics.median(run.seconds for run in runs)
        times.barh(row, middle, 0.55, color=colours[side])
        times.plot([run.seconds for run in runs], [row] * len(runs), "|", color="black", markersize=11)
        times.text(max(run.seconds for run in runs), row, f"  {middle:.1f} s", va="center", fontsize=9)
        peak = max(run.peak_bytes for run in runs) / 1e9
        memory.barh(row, peak, 0.55, color=colours[side])
        memory.text(peak, row, f"  {peak:.2f} GB" if peak else "  a buffer", va="center", fontsize=9)
    memory.axvline(inputs_budget / 1e9, color="black", linestyle=":", linewidth=1)
    memory.text(inputs_budget / 1e9, 3.45, " budget", fontsize=9, va="bottom")
    times.set_yticks(range(len(LABELS)), list(reversed(LABELS.values())))
    times.set_xlabel("seconds for 6.4 GB, on disk at the end (median; each run a tick)")
    memory.set_xlabel("peak memory above the imported libraries, GB")
    times.set_title("A LoRA merged into a model of Llama-3.2-3B's shape", loc="left")
    for axes in (times, memory):
        axes.margins(x=0.18)
    save(figure, (times, memory), path)


if __name__ == "__main__":
    main()
