from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest

from serve.catalogue.storage.atomic_files import create_file, replace_file

ROOT = Path(__file__).parents[4]


def test_an_existing_file_is_never_created_again(tmp_path: Path) -> None:
    path = tmp_path / "entry"

    assert create_file(path, b"first")
    assert not create_file(path, b"second")

    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    replace_file(path, b"a longer content")
    with path.open("rb") as reader:
        replace_file(path, b"short")

        assert reader.read() == b"a longer content", "a reader goes on with the file that it opened"
    assert path.read_bytes() == b"short"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("write", [create_file, replace_file])
def test_only_the_owner_can_read_a_new_file(tmp_path: Path, write: object) -> None:
    write(tmp_path / "secret", b"")  # type: ignore[operator]

    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600


@pytest.mark.parametrize(("write", "call"), [(create_file, "link"), (replace_file, "replace")])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: object, call: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*_: object, **__: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr(os if call == "link" else Path, call, fail)
    with pytest.raises(OSError, match="no room"):
        write(path, b"new")  # type: ignore[operator]

    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_no_module_writes_a_file_in_place() -> None:
    """A reader, or a restart after a full disk, would see a part of it."""
    in_place = re.compile(r"\.write_(text|bytes)\(|open\([^)]*[\"'][wax]")
    writers = [
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "serve").rglob("*.py"))
        if in_place.search(path.read_text())
    ]

    # The store writes into a temporary directory, which is renamed as a whole. A log is only ever added to.
    assert writers == [
        "serve/catalogue/storage/atomic_files.py",
        "serve/observability/logs.py",
    ]
