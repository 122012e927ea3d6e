"""Writers of one destination exclude each other."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from convert.errors import OutputBusy, OutputExists, OutputUnwritable
from convert.write.journal import JOURNAL
from convert.write.publisher import ArtifactWriter, partial_directory


def test_two_writers_of_one_destination_exclude_each_other(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "tiny", "one") as first:
        (first.root / "precious").touch()
        with pytest.raises(OutputBusy, match="Another process is writing"), ArtifactWriter(tmp_path / "tiny", "one"):
            pass
        assert (first.root / "precious").exists()


@pytest.mark.parametrize("end", ["published", "removed"])
def test_a_directory_that_its_owner_ends_while_another_asks_for_the_lock_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    from convert.write import publisher

    lock, seen = publisher._lock, []

    def late(directory: Path) -> int | None:
        """The owner ends between the opening of the directory and its lock."""
        descriptor = lock(directory)
        if not seen:
            seen.append(directory)
            directory.rename(tmp_path / "tiny") if end == "published" else directory.rmdir()
        return descriptor

    monkeypatch.setattr(publisher, "_lock", late)
    if end == "published":
        with pytest.raises(OutputExists), ArtifactWriter(tmp_path / "tiny", "one"):
            pass
        assert not partial_directory(tmp_path / "tiny").exists()
    else:
        with ArtifactWriter(tmp_path / "tiny", "one") as writer:
            assert writer.root.is_dir()


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A directory that no conversion may touch."""
    directory = tmp_path / "victim"
    (directory / "deeper").mkdir(parents=True)
    (directory / "deeper" / "precious").write_text("precious")
    return directory


def test_a_link_in_the_place_of_the_unfinished_artifact_is_refused(tmp_path: Path, victim: Path) -> None:
    partial = partial_directory(tmp_path / "tiny")
    partial.symlink_to(victim)

    with pytest.raises(OutputUnwritable, match="symbolic link"), ArtifactWriter(tmp_path / "tiny", "one"):
        pass

    assert (victim / "deeper" / "precious").read_text() == "precious"
    assert [path.name for path in victim.iterdir()] == ["deeper"]
    assert partial.is_symlink()


def test_a_link_in_an_unfinished_artifact_is_not_followed(tmp_path: Path, victim: Path) -> None:
    """Not even one that a forged journal lists as finished."""
    partial = partial_directory(tmp_path / "tiny")
    partial.mkdir()
    (partial / "model").symlink_to(victim)
    lines = [{"conversion": "one"}, {"file": "model", "sha256": "0" * 64}, {"file": "../victim", "sha256": "0" * 64}]
    (partial / JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in lines))

    with ArtifactWriter(tmp_path / "tiny", "one") as writer:
        (writer.directory("model") / "config.json").write_text("{}")

    assert [path.name for path in victim.iterdir()] == ["deeper"]
    assert (victim / "deeper" / "precious").read_text() == "precious"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    """Its owner could put other files into the artifact."""
    partial = partial_directory(tmp_path / "tiny")
    partial.mkdir()
    (partial / "theirs").touch()
    os.chown(partial, 65534, 65534)

    with pytest.raises(OutputUnwritable, match="another user"), ArtifactWriter(tmp_path / "tiny", "one"):
        pass

    assert (partial / "theirs").exists()
