"""One side of `benchmarks.convert`, in a process of its own: `python -m benchmarks.convert_side SIDE …` prints JSON.

Memory is the peak of the resident set above its size after all imports.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.process_usage import resident_bytes
from convert.artifact.durable_files import sync

SIDES = ("original", "dequantized", "peft")


def main() -> None:
    side, checkpoint, base, out = sys.argv[1], *map(Path, sys.argv[2:5])
    work = {"original": graft, "dequantized": graft, "peft": peft}[side](checkpoint, base, out, side)
    baseline = resident_bytes("VmRSS")
    began, cpu = time.perf_counter(), time.process_time()
    work()
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    peak = resident_bytes("VmHWM") - baseline
    json.dump({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak}, sys.stdout)


def graft(checkpoint: Path, base: Path, out: Path, side: str) -> Callable[[], object]:
    """The work of `python -m convert run --no-measure`: checks, merge, digests, manifest, fsync, rename."""
    import bitsandbytes.functional  # noqa: F401
    import peft  # noqa: F401
    import torch  # noqa: F401
    from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401

    from convert.detection.training import Training
    from convert.pipeline.convert import Destination, convert
    from convert.pipeline.request import Request
    from convert.routes.choose import RouteOptions

    trained_on = Training.LORA if side == "original" else Training.QLORA
    request = Request(checkpoint, base, RouteOptions("merge", "none"), trained_on=trained_on, measure=False)
    return lambda: convert(request, Destination(out, "bench"))


def peft(checkpoint: Path, base: Path, out: Path, side: str) -> Callable[[], object]:
    """The merge of PEFT's documentation, with an fsync at the end as on the other sides."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def work() -> None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        PeftModel.from_pretrained(model, str(checkpoint)).merge_and_unload().save_pretrained(out)
        sync_files(out)

    return work


def sync_files(directory: Path) -> None:
    """fsync of every file and of the directory."""
    for path in (*sorted(directory.iterdir()), directory):
        sync(path)


if __name__ == "__main__":
    main()
