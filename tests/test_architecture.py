"""ARCHITECTURE.md shows the packages that there are, and names only files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "ARCHITECTURE.md").read_text()


def section(begin: str) -> str:
    return PAGE.partition(f"## {begin}")[2].partition("\n## ")[0]


def code_words(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


@pytest.mark.parametrize("root", ["convert", "serve"])
def test_every_package_has_its_row(root: str) -> None:
    rows = [line.split("|")[1] for line in section(f"The packages of `{root}`").splitlines() if line.startswith("| `")]
    packages = {path.parent.name for path in (ROOT / root).glob("*/__init__.py")}
    modules = {path.stem for path in (ROOT / root).glob("*.py") if not path.name.startswith("__")}

    assert {name for row in rows for name in code_words(row)} == packages | modules


def test_the_files_to_start_at_exist() -> None:
    rows = [line.split("|")[2] for line in section("To change something").splitlines() if line.startswith("| ")]
    missing = []
    for row in rows:
        directory = ROOT
        for name in code_words(row):
            if "/" in name:
                directory = (ROOT / name).parent
                missing += [] if list(ROOT.glob(name.rstrip("/"))) else [name]
            elif name.endswith(".py"):
                missing += [] if (directory / name).is_file() else [f"{directory.relative_to(ROOT)}/{name}"]

    assert len(rows) > 20
    assert missing == []


@pytest.mark.parametrize("title", ["A request", "A hot-swap"])
def test_the_steps_name_modules_that_exist(title: str) -> None:
    packages = {path.name for path in (ROOT / "serve").iterdir() if path.is_dir()}
    modules = [name for name in code_words(section(title)) if name.partition("/")[0] in packages and "/" in name]

    assert modules
    assert [name for name in modules if not (ROOT / "serve" / f"{name}.py").is_file()] == []
