"""Files appear with all of their bytes, or an error leaves what was there before."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from convert.artifact.durable_files import create_file, replace_file


def test_a_created_file_never_replaces_another(tmp_path: Path) -> None:
    create_file(tmp_path / "x", b"first")

    with pytest.raises(FileExistsError):
        create_file(tmp_path / "x", b"second")
    assert (tmp_path / "x").read_bytes() == b"first"


def test_a_replaced_file_has_the_new_content_and_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()

    replace_file(tmp_path / "x", b"first")
    replace_file(tmp_path / "x", b"second")

    assert (tmp_path / "x").read_bytes() == b"second"
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert {path.name for path in tmp_path.iterdir()} == {"usual", "x"}


def test_a_failed_replacement_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_file(tmp_path / "x", b"first")

    def full(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        replace_file(tmp_path / "x", b"second")

    assert (tmp_path / "x").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
