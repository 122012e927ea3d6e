"""How a command begins, and that it goes on where nobody reads what it says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_ctrl_c_before_the_command_begins_ends_it_without_a_traceback(tmp_path: Path) -> None:
    """A library that is imported first gets the signal to the process at just that moment."""
    (tmp_path / "typer.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")

    done = subprocess.run(
        [sys.executable, "-m", "serve", "--help"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )

    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_the_program_names_itself_as_it_was_started() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "serve", "run", "--no-such-option"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 2
    assert "Usage: python -m serve run" in done.stderr


def test_a_command_goes_on_when_nobody_reads_its_messages_any_more() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    script = "from serve.cli.console import print_line\nfor _ in range(3):\n    print_line('x')\nprint('went on')"

    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=writer, timeout=120, check=False
    )
    os.close(writer)

    assert (done.returncode, done.stdout) == (0, b"went on\n")
