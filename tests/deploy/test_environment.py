"""The script that makes the environment: what it refuses before it removes anything. It runs as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CREATE = Path(__file__).parents[2] / "deploy" / "environment" / "create.py"


def created(venv: Path) -> subprocess.CompletedProcess[str]:
    """Without a reachable package index, so that nothing is installed where it is not refused."""
    return subprocess.run(
        [sys.executable, str(CREATE), "--venv", str(venv)],
        env={"PATH": "/usr/bin:/bin", "PIP_INDEX_URL": "http://127.0.0.1:1", "PIP_RETRIES": "0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("target", ["an environment", "nothing"])
def test_an_environment_that_is_a_link_is_refused_and_what_it_leads_to_is_kept(tmp_path: Path, target: str) -> None:
    other = tmp_path / "other-checkout" / ".venv"
    if target == "an environment":
        (other / "bin").mkdir(parents=True)
        (other / "pyvenv.cfg").write_text("home = /usr/bin\n")
        (other / "bin" / "graft-serve").write_text("kept")
    (tmp_path / ".venv").symlink_to(other)

    done = created(tmp_path / ".venv")

    assert done.returncode == 1
    assert f"environment: {tmp_path / '.venv'} is a symbolic link to {other}" in done.stderr
    assert "rm " in done.stderr
    kept = {"bin", "graft-serve", "pyvenv.cfg"} if target == "an environment" else set()
    assert {path.name for path in other.rglob("*")} == kept
    assert (tmp_path / ".venv").is_symlink()


def test_a_directory_that_is_no_environment_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("kept")

    done = created(tmp_path)

    assert "is not a virtual environment" in done.stderr
    assert (tmp_path / "thesis.tex").read_text() == "kept"
