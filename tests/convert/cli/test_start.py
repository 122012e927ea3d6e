"""How a command ends that can't begin: Ctrl-C while it is imported, and files that the system refuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from convert.cli.app import app

ROOT = Path(__file__).parents[3]


def test_ctrl_c_before_the_command_begins_ends_it_without_a_traceback(tmp_path: Path) -> None:
    """A library that is imported first gets the signal to the process at just that moment."""
    (tmp_path / "typer.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")

    done = subprocess.run(
        [sys.executable, "-m", "convert", "--help"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )

    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


@pytest.mark.parametrize(
    "command",
    [
        ["inspect", "LONG"],
        ["inspect", "LORA", "--base", "LONG"],
        ["plan", "LORA", "--base", "LONG"],
        ["run", "LORA", "--base", "BASE", "--out", "LONG", "--name", "tiny"],
        ["verify", "LONG", "--no-engine"],
        ["sign", "LONG", "--key", "LONG"],
    ],
    ids=" ".join,
)
def test_what_the_system_refuses_is_an_error_with_a_code(
    lora: Path, base: Path, tmp_path: Path, command: list[str]
) -> None:
    """A name that is too long stands for every refusal: permissions don't hold for whoever runs tests as root."""
    places = {"LONG": str(tmp_path / ("x" * 300)), "LORA": str(lora), "BASE": str(base)}

    result = CliRunner().invoke(app, [places.get(word, word) for word in command])

    assert result.exit_code == 1
    assert result.stderr.startswith("error[file_inaccessible]: ")
    assert "File name too long" in result.stderr
