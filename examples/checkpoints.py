"""Trains all example checkpoints, two at a time.

`python -m examples.checkpoints --base DIR --out DIR` leaves one directory per behaviour in DIR, and
skips those that are complete.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from examples.behaviours import BEHAVIOURS
from examples.finetune import checkpoint_in

AT_ONCE = 2


def ensure_checkpoints(base: Path, out: Path) -> bool:
    """Train the missing checkpoints. Returns whether all of them exist afterwards."""
    missing = [name for name in BEHAVIOURS if not is_complete(out / name)]
    for name in BEHAVIOURS.keys() - missing:
        print(f"{name}: {checkpoint_in(out / name)} is there", flush=True)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        codes = list(pool.map(lambda name: run_finetune(name, base, out / name), missing))
    return not any(codes)


def is_complete(directory: Path) -> bool:
    # A checkpoint is published by a rename, so one that exists is complete.
    return directory.is_dir()


def run_finetune(name: str, base: Path, out: Path) -> int:
    """Train one behaviour in its own process, on one core. Returns the exit status."""
    command = [sys.executable, "-m", "examples.finetune", name, "--base", str(base), "--out", str(out)]
    # With more than one thread each, the two trainings would wait for each other at every layer.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run(command, env=environment, check=False).returncode


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train all example checkpoints that are missing.")
    parser.add_argument("--base", type=Path, required=True, help="the directory that base_model made")
    parser.add_argument("--out", type=Path, required=True, help="where the checkpoints are to be")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    if not ensure_checkpoints(options.base, options.out):
        sys.exit("checkpoints: not all trainings succeeded; those that did are kept")
    print(f"checkpoints: all in {options.out} after {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
