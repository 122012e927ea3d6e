"""A conversion that is started again after it has finished, as Kubernetes does with a Job whose later step failed."""

from __future__ import annotations

from pathlib import Path

import pytest

from convert.artifact import MANIFEST
from tests.convert.cli.test_cli import invoke

OPTIONS = ("--no-measure", "--keep-finished")


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    """On a volume where it may be recorded which conversion an artifact is of."""
    (tmp_path / "volume").mkdir()
    return tmp_path / "volume" / "tiny"


def test_a_second_try_finds_the_artifact_of_the_first_and_writes_nothing(
    qlora: Path, base: Path, destination: Path
) -> None:
    command = ("run", qlora, "--base", base, "--out", destination, *OPTIONS)
    assert invoke(*command).exit_code == 0
    written = {path: path.stat().st_mtime_ns for path in destination.parent.rglob("*")}

    assert invoke(*command).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in destination.parent.rglob("*")} == written


@pytest.mark.parametrize("changed", ["checkpoint", "format", "name"])
def test_an_artifact_of_another_conversion_is_not_taken_for_it(
    qlora: Path, lora: Path, base: Path, destination: Path, changed: str
) -> None:
    assert invoke("run", qlora, "--base", base, "--out", destination, *OPTIONS).exit_code == 0
    checkpoint = lora if changed == "checkpoint" else qlora
    options = {"format": ("--route", "merge", "--quantize", "none"), "name": ("--name", "other")}.get(changed, ())

    second = invoke("run", checkpoint, "--base", base, "--out", destination, *OPTIONS, *options)

    assert "output_exists" in second.output


def test_an_artifact_that_was_exchanged_since_is_not_taken_for_it(qlora: Path, base: Path, destination: Path) -> None:
    command = ("run", qlora, "--base", base, "--out", destination, *OPTIONS)
    assert invoke(*command).exit_code == 0
    (destination / MANIFEST).write_text((destination / MANIFEST).read_text() + "\n")

    assert "output_exists" in invoke(*command).output


def test_without_the_option_nothing_is_kept_or_recorded(qlora: Path, base: Path, out: Path) -> None:
    command = ("run", qlora, "--base", base, "--out", out, "--no-measure")
    assert invoke(*command).exit_code == 0

    assert [path.name for path in out.parent.glob(".*")] == []
    assert "output_exists" in invoke(*command).output
    assert "output_exists" in invoke(*command, "--keep-finished").output
