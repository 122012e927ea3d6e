"""Writes docs/reference/command-line.md from the commands themselves. `make docs` runs it before it builds the site.

Typer describes its own applications in Markdown (`typer MODULE utils docs`). Changed are the level of the headings and
the lists of commands, which Typer cuts off after some words; the headings name the commands as well.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reference" / "command-line.md"
# Program -> the module of its application.
PROGRAMS = {"convert": "convert.cli.app", "serve": "serve.cli.app"}

_HEAD = """# Command line

This page lists every command with its arguments and options. It is generated: `make docs` writes it, and a test
compares it with the commands. `python -m convert` makes artifacts of checkpoints, `python -m serve` serves them.
[Settings](settings.md) explains the options of `serve run` that set one, and [error codes](errors.md) what a command
prints when it fails.
"""
_COMMANDS = re.compile(r"\*\*Commands\*\*:\n\n(?:\* .*\n)+\n?")


def page() -> str:
    """The whole page as Markdown."""
    return "\n".join([_HEAD, *map(_section, PROGRAMS)]).rstrip() + "\n"


def _section(program: str) -> str:
    command = [sys.executable, "-m", "typer", PROGRAMS[program], "utils", "docs", "--name", f"python -m {program}"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S603  (constants)
    text = _COMMANDS.sub("", finished.stdout).replace("&#x27;", "'").replace("&quot;", '"')
    return re.sub(r"^#", "##", text, flags=re.MULTILINE)


if __name__ == "__main__":
    PAGE.write_text(page())
