"""Progress of a benchmark on standard output, also where that is a file or a pipe: one line for each step."""

from __future__ import annotations

import time

import psutil


def step(text: str) -> None:
    """Print `text` with the seconds since this process started, at once and not when a buffer is full."""
    elapsed_s = time.time() - psutil.Process().create_time()
    print(f"[{elapsed_s:6.0f} s] {text}", flush=True)
