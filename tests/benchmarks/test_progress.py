"""Progress is visible while a benchmark runs, also when its output is a pipe."""

from __future__ import annotations

import re
import subprocess
import sys


def test_a_step_reaches_a_pipe_at_once_with_the_elapsed_seconds() -> None:
    code = "from benchmarks.progress import step; step('warm-up'); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        line = process.stdout.readline()
        assert process.poll() is None, "the process still runs"
        process.communicate("\n")

    assert re.fullmatch(r"\[ +\d+ s\] warm-up\n", line)
