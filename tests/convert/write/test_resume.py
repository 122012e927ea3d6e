"""A conversion killed at any point is taken up by the next run of it, and ends in the same bytes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from convert.write.journal import JOURNAL, Journal
from convert.write.publisher import partial_directory
from tests.convert import parts
from tests.convert.asking import convert
from tests.convert.write.interruption import SHARD_BYTES, content, finished_files, request, stopped


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parts.save_base(tmp_path_factory.mktemp("model") / "base", tied=True, layers=3)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    return parts.mark_lora(parts.save_adapter(model, tmp_path_factory.mktemp("adapter") / "lora"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Path, adapter: Path) -> Callable[[str], dict[str, bytes]]:
    """The files of an uninterrupted run."""
    home, contents = tmp_path_factory.mktemp("whole"), {}

    def of(quantize: str) -> dict[str, bytes]:
        if quantize not in contents:
            convert(request(adapter, model, home / quantize, quantize))
            contents[quantize] = content(home / quantize)
        return contents[quantize]

    return of


class OpenedShards:
    """Which shards a run opened for writing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from convert.safetensors_io.direct_io import IoThreads
        from convert.safetensors_io.shards import Shard, ShardWriter
        from convert.write import model

        self.files: list[str] = []

        def opened(directory: Path, shard: Shard, threads: IoThreads) -> ShardWriter:
            self.files.append(f"model/{shard.file}")
            return ShardWriter(directory, shard, threads)

        monkeypatch.setattr(model, "ShardWriter", opened)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_killed_anywhere_a_conversion_goes_on_and_ends_in_the_same_bytes(
    model: Path, adapter: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantize: str
) -> None:
    expected = whole(quantize)
    shards = {name for name in expected if name.endswith(".safetensors")}
    assert len(shards) > 2
    events = int(stopped(adapter, model, tmp_path, quantize, [0]))
    assert content(tmp_path / "0" / "tiny") == expected
    points = range(1, events + 1, max(1, events // 30))
    assert len(points) > 25
    stopped(adapter, model, tmp_path, quantize, points)
    opened_shards, kept = OpenedShards(monkeypatch), set()
    for at in points:
        out = tmp_path / str(at) / "tiny"
        if not out.exists():
            finished, opened_shards.files[:] = set(finished_files(out)), []
            kept.add(len(finished))
            convert(request(adapter, model, out, quantize))
            assert set(opened_shards.files) == shards - finished, f"killed at event {at}"
        assert content(out) == expected, f"killed at event {at}"
        assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert kept == set(range(len(shards) + 1)), "killed with each number of shards finished"


def test_sigterm_leaves_what_is_finished_and_the_next_run_takes_it_up(
    model: Path, adapter: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = int(stopped(adapter, model, tmp_path, "none", [0])) // 2
    stopped(adapter, model, tmp_path, "none", [half], how=signal.SIGTERM)
    out = tmp_path / str(half) / "tiny"
    finished = set(finished_files(out))
    assert finished

    opened_shards = OpenedShards(monkeypatch)
    convert(request(adapter, model, out))

    assert not finished & set(opened_shards.files)
    assert content(out) == whole("none")


@pytest.fixture
def interrupted(model: Path, adapter: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A destination beside which an unfinished conversion lies, with two finished shards."""
    seen: list[str] = []
    add = Journal.add

    def counted(self: Journal, path: Path, sha256: str) -> None:
        add(self, path, sha256)
        seen.append(path.name)

    def stop(step: str, done: int, total: int) -> None:
        if len(seen) == 2:
            raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", counted)
        with pytest.raises(SystemExit):
            convert(request(adapter, model, out), stop)
    assert len(finished_files(out)) == 2
    return out


def test_a_finished_shard_whose_bytes_changed_is_written_again(
    model: Path, adapter: Path, whole: Any, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged, kept = finished_files(interrupted)
    path = partial_directory(interrupted) / damaged
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    opened_shards = OpenedShards(monkeypatch)
    convert(request(adapter, model, interrupted))

    assert damaged in opened_shards.files
    assert kept not in opened_shards.files
    assert content(interrupted) == whole("none")


@pytest.mark.parametrize("tail", ['{"file": "model/mod', "\0\0\0", ""], ids=["torn", "zeros", "whole"])
def test_a_torn_journal_costs_only_the_files_that_it_no_longer_lists(
    model: Path, adapter: Path, whole: Any, interrupted: Path, tail: str
) -> None:
    with (partial_directory(interrupted) / JOURNAL).open("a") as stream:
        stream.write(tail)

    convert(request(adapter, model, interrupted))

    assert content(interrupted) == whole("none")


def another_adapter(adapter: Path, model: Path, folder: Path) -> dict[str, Any]:
    changed = parts.copy(adapter, folder / "other")
    parts.edit_weights(changed, lambda tensors: {name: 2 * tensor for name, tensor in tensors.items()})
    return {"checkpoint": changed}


CHANGES: dict[str, Callable[[Path, Path, Path], dict[str, Any]]] = {
    "another adapter": another_adapter,
    "another type": lambda *_: {"dtype": "float16"},
    "other shards": lambda *_: {"shard_bytes": 2 * SHARD_BYTES},
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_conversion_takes_up_nothing(
    model: Path, adapter: Path, interrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    from dataclasses import replace

    another = replace(request(adapter, model, interrupted), **CHANGES[change](adapter, model, tmp_path))
    opened_shards = OpenedShards(monkeypatch)
    convert(another)

    written = content(interrupted)
    assert set(opened_shards.files) == {name for name in written if name.endswith(".safetensors")}
    convert(replace(another, destination=tmp_path / "fresh"))
    assert written == content(tmp_path / "fresh")


def test_a_base_that_was_changed_in_place_and_looks_as_old_as_before_is_another_one(
    model: Path, adapter: Path, whole: Any, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model / "model.safetensors"
    before, stamp = path.read_bytes(), path.stat()
    with path.open("r+b") as stream:
        stream.write(before[:-1] + bytes([before[-1] ^ 1]))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    opened_shards = OpenedShards(monkeypatch)
    try:
        convert(request(adapter, model, interrupted))
    finally:
        path.write_bytes(before)

    assert set(opened_shards.files) == {name for name in whole("none") if name.endswith(".safetensors")}


def test_other_code_takes_up_nothing(
    model: Path, adapter: Path, whole: Any, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from convert.write import journal

    monkeypatch.setattr(journal, "_code", lambda: "another version")
    opened_shards = OpenedShards(monkeypatch)
    convert(request(adapter, model, interrupted))

    assert len(opened_shards.files) == len([name for name in whole("none") if name.endswith(".safetensors")])


def test_unfinished_files_are_not_published(model: Path, adapter: Path, whole: Any, interrupted: Path) -> None:
    (partial_directory(interrupted) / "model" / "model.safetensors.index.json.tmp").write_text("left by somebody")
    (partial_directory(interrupted) / "adapter").mkdir()
    (partial_directory(interrupted) / "adapter" / "x").symlink_to("/etc/passwd")

    convert(request(adapter, model, interrupted))

    assert content(interrupted) == whole("none")


def test_files_of_an_interrupted_run_count_as_free_room(
    model: Path, adapter: Path, whole: Any, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from convert.plan import machine

    asked = []
    monkeypatch.setattr(machine, "require_room", lambda needed, destination: asked.append(needed))
    convert(request(adapter, model, interrupted))
    parts.remove(interrupted)
    convert(request(adapter, model, interrupted))

    assert 0 < asked[0] < asked[1]
