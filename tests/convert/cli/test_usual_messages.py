"""A usual message of a library is not shown; every other one is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_a_conversion_to_4_bits_shows_nothing_but_its_own_lines(qlora: Path, base: Path, out: Path) -> None:
    words = ["convert", "run", qlora, "--base", base, "--target", "cpu", "--no-measure", "--out", out]
    environment = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, words)], capture_output=True, text=True, timeout=300, env=environment
    )

    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines
    assert [line for line in lines if not line.startswith("[")] == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please make sure …", False),
        ("The weights are damaged: %s", True),
    ],
)
def test_only_the_usual_message_is_hidden(text: str, shown: bool) -> None:
    program = (
        "import logging\n"
        "from convert.cli.usual_messages import hide_usual_messages\n"
        "hide_usual_messages()\n"
        f"logging.getLogger('bitsandbytes.backends.cpu.ops').warning({text!r}, 'no module')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)

    assert ("no module" in done.stderr) is shown
