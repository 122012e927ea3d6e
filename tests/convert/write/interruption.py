"""A conversion that is stopped at its n-th event, and what it leaves."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from convert.write.journal import JOURNAL
from convert.write.publisher import partial_directory
from tests.convert import parts
from tests.convert.asking import Request

SHARD_BYTES = 60_000

# Runs the conversion again and again, each time in a fork that is stopped at its n-th event: a block of weights that
# arrives, or something that is about to be made durable, renamed or removed. Prints how many events a whole run has.
# What is imported before the fork need not be imported in each.
STOPPED = """
import os, signal, sys
from pathlib import Path
import bitsandbytes.functional, peft, torch
from transformers import AutoTokenizer, LlamaForCausalLM
from convert.artifact import scratch
from convert.cli.console import exit_on_sigterm
from tests.convert.asking import Request, convert
checkpoint, base, folder = map(Path, sys.argv[1:4])
quantize, shard_bytes, number, points = sys.argv[4], int(sys.argv[5]), int(sys.argv[6]), sys.argv[7:]
torch.set_num_threads(1)
scratch._MIN_AGE_S = float("inf")  # what a killed run left is removed by a later one: events that the others don't have
def run(at):
    count = 0
    def event(*event_arguments):
        nonlocal count
        count += 1
        if count == at:
            os.kill(os.getpid(), number)
    def counted(function):
        def call(*given, **settings):
            event()
            return function(*given, **settings)
        return call
    signal.signal(signal.SIGTERM, exit_on_sigterm)
    for name in ("fsync", "rename", "unlink", "replace", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    out = folder / str(at) / "tiny"
    out.parent.mkdir()
    convert(Request(checkpoint, base, out, "tiny", route="merge", quantize=quantize, measure=False,
                    shard_bytes=shard_bytes), event)
    return count
for at in map(int, points):
    child = os.fork()
    if child == 0:
        print(run(at), flush=True)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == (0 if at == 0 else -number if number == signal.SIGKILL else 128 + number), (at, status)
"""


def request(checkpoint: Path, base: Path, out: Path, quantize: Any = "none") -> Request:
    return Request(
        checkpoint, base, out, "tiny", route="merge", quantize=quantize, measure=False, shard_bytes=SHARD_BYTES
    )


def content(root: Path) -> dict[str, bytes]:
    return {name: (root / name).read_bytes() for name in parts.tree(root)}


def stopped(
    adapter: Path, model: Path, folder: Path, quantize: str, points: Iterable[int], how: int = signal.SIGKILL
) -> str:
    """Runs stopped at these events, the one at event n below `folder`/n. Returns what was printed."""
    words = [STOPPED, adapter, model, folder, quantize, SHARD_BYTES, int(how), *points]
    process = subprocess.run([sys.executable, "-c", *map(str, words)], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return process.stdout


def finished_files(out: Path) -> dict[str, str]:
    path = partial_directory(out) / JOURNAL
    entries = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return {entry["file"]: entry["sha256"] for entry in entries if "file" in entry}
