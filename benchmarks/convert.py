"""How fast a merge is, and how little memory it takes, beside `cp` of the same bytes; and what the exact route loses.

`python -m benchmarks.convert` makes a model of Llama-3.2-3B's shape with random weights and a LoRA of rank 16 on
every linear layer, then takes turns: `cp` + fsync of the model, the merge onto the original weights, the merge onto
its NF4 form, each in a process of its own and in alternating order, so that what the disk does at that moment meets
all of them. Input is in the page cache where memory allows that, for all sides alike, and what was written before has
reached the disk when the clock starts. A first turn is not counted. PEFT's load, merge and save run once.
`other_processes` says how many cores were somebody else's meanwhile (the kernel's writeback among them): a merge takes
several times the processor time of `cp`, so a busy machine slows it down more.

`cp` fills the page cache with what it writes, a merge writes past it. On a virtual machine whose host takes free memory
back that costs `cp` its pages anew, twice its time: `fastest_cp_s` is what it takes where it doesn't.

The floor of the exact route's KL is the self-noise of bfloat16: the KL between the function as trained in float32 and
the same function as its trainer computes it (4-bit base and adapter by bitsandbytes and PEFT, in bfloat16). Below
twice that, or 1e-4 nats, a result can't be told from the model that was trained.
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
from benchmarks.convert_side import sync_files
from benchmarks.record import Figure, write_result
from benchmarks.routes import BEHAVIOUR, chats, function_as_trained, quantized_base
from benchmarks.turns import in_turns
from convert.artifact import size_bytes
from convert.conversion import Destination, convert
from convert.nf4 import BLOCK, Nf4
from convert.preparation import Request
from convert.progress import silent
from convert.quality import Reference, Text, measure
from convert.routes.choose import Wish
from convert.routes.stream import rows_of_block
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
    """One run of one side; memory above what the process held when everything was imported."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int = 0
    others: float = 0.0  # cores that other processes kept busy


@dataclass(frozen=True)
class Inputs:
    """What is merged: an adapter, and the base in both forms."""

    adapter: Path
    original: Path
    nf4: Path

    def base(self, side: str) -> Path:
        return self.nf4 if side == "dequantized" else self.original


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of every side but PEFT (default 5)")
    parser.add_argument("--work", type=Path, default=Path("build"), help="where 22 GB have room (default build/)")
    options = parser.parse_args()
    make_checkpoints()
    options.work.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work, prefix="bench-convert-") as directory:
        home = Path(directory)
        inputs = make_inputs(home)
        samples = run_sides(inputs, home / "out", options.rounds)
        found = (
            speed_figures(samples) | memory_figures(samples, inputs) | {"nf4_dequantize_elements_per_s": nf4_speed()}
        )
    with tempfile.TemporaryDirectory() as directory:
        found |= exactness_figures(Path(directory))
    write_result("convert", found, "make bench-convert")
    draw(samples, inputs_budget=found["budget_bytes"].value, path=Path(__file__).parent / "results" / "convert.png")


def make_inputs(home: Path) -> Inputs:
    print("making a model of Llama-3.2-3B's shape …", flush=True)
    return Inputs(
        llama3b.save_adapter(home / "adapter"),
        llama3b.save_base(home / "original", MODEL),
        llama3b.save_base(home / "nf4", MODEL, Nf4()),
    )


def run_sides(inputs: Inputs, out: Path, rounds: int) -> dict[str, list[Sample]]:
    samples: dict[str, list[Sample]] = {side: [] for side in LABELS}
    order = ["cp", *GRAFT_SIDES]
    print("a turn that is not counted …", flush=True)
    for side in order:
        run_side(side, inputs, out)
    for _, side in in_turns(order, rounds):
        samples[side].append(run_side(side, inputs, out))
    samples["peft"].append(run_side("peft", inputs, out))
    return samples


def run_side(side: str, inputs: Inputs, out: Path) -> Sample:
    os.sync()
    began, busy, own = time.perf_counter(), busy_seconds(), children_seconds()
    sample = copy(inputs.original, out) if side == "cp" else in_process(side, inputs, out)
    others = (busy_seconds() - busy - children_seconds() + own) / (time.perf_counter() - began)
    sample = replace(sample, others=max(others, 0.0))
    shutil.rmtree(out)
    told = f"{sample.cpu_seconds:.1f} CPU-s, {sample.peak_bytes / 1e6:.0f} MB, others {sample.others:.1f} cores"
    print(f"{side}: {sample.seconds:.1f} s, {told}", flush=True)
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


def busy_seconds() -> float:
    """Of all processors together, in user and system mode, since the machine started."""
    user, nice, system = map(int, Path("/proc/stat").read_text().split(maxsplit=4)[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def speed_figures(samples: dict[str, list[Sample]]) -> dict[str, Figure]:
    """Ratios are of speeds, each between runs of the same turn."""

    def ratio(side: str) -> list[float]:
        return [copied.seconds / it.seconds for copied, it in zip(samples["cp"], samples[side], strict=False)]

    seconds = {f"{side}_s": Figure.of([it.seconds for it in runs], "s") for side, runs in samples.items()}
    cpu = {f"{side}_cpu_s": Figure.of([it.cpu_seconds for it in runs], "CPU-s") for side, runs in samples.items()}
    copied = statistics.median(it.seconds for it in samples["cp"])
    fastest = min(it.seconds for it in samples["cp"])
    merged = statistics.median(it.seconds for it in samples["original"])
    return {
        "merge_w16_vs_cp": Figure.of(ratio("original"), "speed ratio", ">= 0.8"),
        "merge_dq_vs_cp": Figure.of(ratio("dequantized"), "speed ratio", ">= 0.6"),
        "merge_w16_vs_fastest_cp": Figure(fastest / merged, "speed ratio"),
        "peft_vs_cp": Figure(copied / samples["peft"][0].seconds, "speed ratio"),
        "fastest_cp_s": Figure(fastest, "s"),
        "other_processes": Figure.of([it.others for runs in samples.values() for it in runs], "cores"),
        **seconds,
        **cpu,
    }


def memory_figures(samples: dict[str, list[Sample]], inputs: Inputs) -> dict[str, Figure]:
    """The budget: the adapter, twice the largest tensor as stored (the embedding), and 256 MB."""
    largest = llama3b.VOCABULARY * llama3b.HIDDEN * 2
    budget = size_bytes(inputs.adapter) + 2 * largest + ALLOWANCE_BYTES
    peaks = {side: [float(it.peak_bytes) for it in samples[side]] for side in (*GRAFT_SIDES, "peft")}
    return {
        "budget_bytes": Figure(budget, "bytes"),
        "merge_rss_over_budget": Figure.of([it / budget for it in peaks["original"]], "peak / budget", "<= 1"),
        "merge_dq_rss_over_budget": Figure.of([it / budget for it in peaks["dequantized"]], "peak / budget", "<= 1"),
        "merge_rss_bytes": Figure.of(peaks["original"], "bytes"),
        "merge_dq_rss_bytes": Figure.of(peaks["dequantized"], "bytes"),
        "peft_rss_bytes": Figure.of(peaks["peft"], "bytes"),
    }


def nf4_speed() -> Figure:
    """NF4 to float32 in blocks of rows on one thread, as the merge does it."""
    import torch

    torch.set_num_threads(1)
    shape = llama3b.LINEARS["mlp.up_proj"]
    settings, rows = Nf4(), rows_of_block(shape)
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
    convert(Request(source, MODEL, Wish("merge", "none"), measure=False), Destination(out, "bench"))
    found, ratios = {}, []
    for name, text in {"chat": chats(home / "chat.jsonl"), "other_text": Text.open(None)}.items():
        reference = function_as_trained(source, text)
        exact = measure(reference, out / "model", None, silent).kl_mean
        noise = self_noise(reference, source)
        ratios.append(exact / max(KL_FLOOR, 2 * noise))
        found[f"exact_kl_{name}"] = Figure(exact, "nats/token")
        found[f"bf16_self_noise_{name}"] = Figure(noise, "nats/token")
        print(f"exact route on {name}: KL {exact:.2g}, self-noise {noise:.2g}", flush=True)
    return {"exact_kl_over_floor": Figure(max(ratios), "ratio, the worse text", "<= 1"), **found}


def self_noise(reference: Reference, source: Path) -> float:
    """Mean KL from the function as trained in float32 to the same one in bfloat16, as its trainer computes it."""
    import torch

    divergences = []
    for number, got in enumerate(trainer_log_probs(reference, source)):
        want64, got64 = torch.cat(list(reference.kept.log_probs(number))).double(), got.double()
        divergences.append((want64.exp() * (want64 - got64)).sum(-1).clamp_min(0))
    return float(torch.cat(divergences).mean())


def trainer_log_probs(reference: Reference, source: Path) -> Iterator[Any]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(quantized_base(), dtype=torch.bfloat16, attn_implementation="eager")
    adapted = PeftModel.from_pretrained(model, str(source)).to(torch.bfloat16).eval()
    with torch.inference_mode():
        for row in reference.rows.measured:
            yield torch.log_softmax(adapted(row, use_cache=False).logits[0, :-1].float(), dim=-1)


def draw(samples: dict[str, list[Sample]], inputs_budget: float, path: Path) -> None:
    """Time of every run, and peak memory against the budget."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    colours = {"cp": "0.55", "original": "#2a9d5c", "dequantized": "#3b6fb6", "peft": "#c8452f"}
    figure, (times, memory) = pyplot.subplots(1, 2, figsize=(12, 3.6), constrained_layout=True, sharey=True)
    for row, side in enumerate(reversed(LABELS)):
        runs = samples[side]
        middle = statistics.median(it.seconds for it in runs)
        times.barh(row, middle, 0.55, color=colours[side])
        times.plot([it.seconds for it in runs], [row] * len(runs), "|", color="black", markersize=11)
        times.text(max(it.seconds for it in runs), row, f"  {middle:.1f} s", va="center", fontsize=9)
        peak = max(it.peak_bytes for it in runs) / 1e9
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
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
