"""A conversion killed at any point is taken up by the next run of it, and ends in the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from convert.errors import OutputBusy, OutputExists
from convert.journal import JOURNAL, Journal
from convert.writer import ArtifactWriter, partial
from tests.convert import parts
from tests.convert.asking import Request, convert

SHARD_BYTES = 60_000

# Runs the conversion again and again, each time in a fork that is stopped at its n-th event: a block of weights that
# arrives, or something that is about to be made durable, renamed or removed. Prints how many events a whole run has.
STOPPED = """
import os, signal, sys
from pathlib import Path
import bitsandbytes.functional, torch
from convert.__main__ import _terminate
from tests.convert.asking import Request, convert
checkpoint, base, folder = map(Path, sys.argv[1:4])
quantize, shard_bytes, number, points = sys.argv[4], int(sys.argv[5]), int(sys.argv[6]), sys.argv[7:]
torch.set_num_threads(1)
def run(at):
    count = 0
    def event(*told):
        nonlocal count
        count += 1
        if count == at:
            os.kill(os.getpid(), number)
    def counted(function):
        def call(*given, **settings):
            event()
            return function(*given, **settings)
        return call
    signal.signal(signal.SIGTERM, _terminate)
    for name in ("fsync", "rename", "unlink", "replace", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    out = folder / str(at) / "tiny"
    out.parent.mkdir()
    convert(Request(checkpoint, base, out, "tiny", route="merge", quantize=quantize, measure=False,
                    shard_bytes=shard_bytes), event)
    return count
for at in map(int, points):
    child = os.fork()
    if child == 0:
        print(run(at), flush=True)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == (0 if at == 0 else -number if number == signal.SIGKILL else 128 + number), (at, status)
"""


def request(checkpoint: Path, base: Path, out: Path, quantize: Any = "none") -> Request:
    return Request(
        checkpoint, base, out, "tiny", route="merge", quantize=quantize, measure=False, shard_bytes=SHARD_BYTES
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parts.save_base(tmp_path_factory.mktemp("model") / "base", tied=True, layers=3)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    return parts.mark_lora(parts.save_adapter(model, tmp_path_factory.mktemp("adapter") / "lora"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Path, adapter: Path) -> Callable[[str], dict[str, bytes]]:
    """The files of an uninterrupted run."""
    home, made = tmp_path_factory.mktemp("whole"), {}

    def of(quantize: str) -> dict[str, bytes]:
        if quantize not in made:
            convert(request(adapter, model, home / quantize, quantize))
            made[quantize] = content(home / quantize)
        return made[quantize]

    return of


def content(root: Path) -> dict[str, bytes]:
    return {name: (root / name).read_bytes() for name in parts.tree(root)}


def stopped(
    adapter: Path, model: Path, folder: Path, quantize: str, points: Iterable[int], how: int = signal.SIGKILL
) -> str:
    """Runs stopped at these events, the one at event n below `folder`/n. Returns what was printed."""
    words = [STOPPED, adapter, model, folder, quantize, SHARD_BYTES, int(how), *points]
    process = subprocess.run([sys.executable, "-c", *map(str, words)], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return process.stdout


def noted(out: Path) -> dict[str, str]:
    path = partial(out) / JOURNAL
    entries = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return {entry["file"]: entry["sha256"] for entry in entries if "file" in entry}


class Made:
    """Which shards a run opened for writing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from convert.routes import model
        from convert.shards import Shard, ShardWriter, Threads

        self.files: list[str] = []

        def opened(directory: Path, shard: Shard, threads: Threads) -> ShardWriter:
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
    made, kept = Made(monkeypatch), set()
    for at in points:
        out = tmp_path / str(at) / "tiny"
        if not out.exists():
            finished, made.files[:] = set(noted(out)), []
            kept.add(len(finished))
            convert(request(adapter, model, out, quantize))
            assert set(made.files) == shards - finished, f"killed at event {at}"
        assert content(out) == expected, f"killed at event {at}"
        assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert kept == set(range(len(shards) + 1)), "killed with each number of shards finished"


def test_sigterm_leaves_what_is_finished_and_the_next_run_takes_it_up(
    model: Path, adapter: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(adapter, model, tmp_path, "none", [30], how=signal.SIGTERM)
    out = tmp_path / "30" / "tiny"
    finished = set(noted(out))
    assert finished

    made = Made(monkeypatch)
    convert(request(adapter, model, out))

    assert not finished & set(made.files)
    assert content(out) == whole("none")


@pytest.fixture
def interrupted(model: Path, adapter: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A destination beside which an unfinished conversion lies, with two finished shards."""
    seen: list[str] = []
    note = Journal.note

    def counted(self: Journal, path: Path, sha256: str) -> None:
        note(self, path, sha256)
        seen.append(path.name)

    def stop(what: str, done: int, total: int) -> None:
        if len(seen) == 2:
            raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "note", counted)
        with pytest.raises(SystemExit):
            convert(request(adapter, model, out), stop)
    assert len(noted(out)) == 2
    return out


def test_a_finished_shard_whose_bytes_changed_is_made_again(
    model: Path, adapter: Path, whole: Any, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged, kept = noted(interrupted)
    path = partial(interrupted) / damaged
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    made = Made(monkeypatch)
    convert(request(adapter, model, interrupted))

    assert damaged in made.files
    assert kept not in made.files
    assert content(interrupted) == whole("none")


@pytest.mark.parametrize("tail", ['{"file": "model/mod', "\0\0\0", ""], ids=["torn", "zeros", "whole"])
def test_a_torn_journal_costs_only_what_it_no_longer_tells(
    model: Path, adapter: Path, whole: Any, interrupted: Path, tail: str
) -> None:
    with (partial(interrupted) / JOURNAL).open("a") as stream:
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

    other = replace(request(adapter, model, interrupted), **CHANGES[change](adapter, model, tmp_path))
    made = Made(monkeypatch)
    convert(other)

    written = content(interrupted)
    assert set(made.files) == {name for name in written if name.endswith(".safetensors")}
    convert(replace(other, destination=tmp_path / "fresh"))
    assert written == content(tmp_path / "fresh")


def test_a_base_that_was_changed_in_place_and_looks_as_old_as_before_is_another_one(
    model: Path, adapter: Path, whole: Any, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model / "model.safetensors"
    before, stamp = path.read_bytes(), path.stat()
    with path.open("r+b") as stream:
        stream.write(before[:-1] + bytes([before[-1] ^ 1]))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    made = Made(monkeypatch)
    try:
        convert(request(adapter, model, interrupted))
    finally:
        path.write_bytes(before)

    assert set(made.files) == {name for name in whole("none") if name.endswith(".safetensors")}


def test_other_code_takes_up_nothing(
    model: Path, adapter: Path, whole: Any, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from convert import journal

    monkeypatch.setattr(journal, "_code", lambda: "another version")
    made = Made(monkeypatch)
    convert(request(adapter, model, interrupted))

    assert len(made.files) == len([name for name in whole("none") if name.endswith(".safetensors")])


def test_what_was_never_finished_is_not_published(model: Path, adapter: Path, whole: Any, interrupted: Path) -> None:
    (partial(interrupted) / "model" / "model.safetensors.index.json.tmp").write_text("left by somebody")
    (partial(interrupted) / "adapter").mkdir()
    (partial(interrupted) / "adapter" / "x").symlink_to("/etc/passwd")

    convert(request(adapter, model, interrupted))

    assert content(interrupted) == whole("none")


def test_two_writers_of_one_destination_exclude_each_other(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "tiny", "one") as first:
        (first.root / "precious").touch()
        with pytest.raises(OutputBusy, match="Another process is writing"), ArtifactWriter(tmp_path / "tiny", "one"):
            pass
        assert (first.root / "precious").exists()


def test_what_an_interrupted_run_left_is_no_reason_to_lack_room(
    model: Path, adapter: Path, whole: Any, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from convert import conversion

    asked = []
    monkeypatch.setattr(conversion, "require_room", lambda needed, destination: asked.append(needed))
    convert(request(adapter, model, interrupted))
    parts.remove(interrupted)
    convert(request(adapter, model, interrupted))

    assert 0 < asked[0] < asked[1]


@pytest.mark.parametrize("end", ["published", "removed"])
def test_a_directory_that_its_owner_ends_while_another_asks_for_the_lock_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    from convert import writer

    lock, seen = writer._lock, []

    def late(directory: Path) -> int | None:
        """The owner ends between the opening of the directory and its lock."""
        descriptor = lock(directory)
        if not seen:
            seen.append(directory)
            directory.rename(tmp_path / "tiny") if end == "published" else directory.rmdir()
        return descriptor

    monkeypatch.setattr(writer, "_lock", late)
    if end == "published":
        with pytest.raises(OutputExists), ArtifactWriter(tmp_path / "tiny", "one"):
            pass
        assert not partial(tmp_path / "tiny").exists()
    else:
        with ArtifactWriter(tmp_path / "tiny", "one") as mine:
            assert mine.root.is_dir()
