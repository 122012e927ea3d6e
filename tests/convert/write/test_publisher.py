"""An artifact appears whole or not at all, and the same input gives the same bytes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from convert.artifact import Artifact
from convert.errors import ArtifactInvalid, OutputExists, OutputUnwritable
from tests.convert import parts
from tests.convert.asking import Request, convert


def run(checkpoint: Path, base: Path, out: Path, **settings: Any) -> Artifact:
    return convert(
        Request(checkpoint=checkpoint, base=base, destination=out, **{"name": "tiny", "measure": False, **settings})
    )


def test_the_same_input_gives_the_same_bytes(qlora: Path, base: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run(qlora, base, tmp_path / name)

    files = parts.tree(tmp_path / "one")
    assert files == parts.tree(tmp_path / "two")
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_a_published_artifact_verifies_until_a_byte_changes(qlora: Path, base: Path, out: Path) -> None:
    artifact = run(qlora, base, out)
    artifact.verify()

    weights = out / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (out / "adapter" / "extra").touch()

    with pytest.raises(ArtifactInvalid, match=r"model/model\.safetensors has other bytes; adapter/extra is not in"):
        artifact.verify()


@pytest.mark.parametrize("kind", ["directory", "file", "dangling link"])
def test_an_existing_destination_is_left_untouched(qlora: Path, base: Path, out: Path, kind: str) -> None:
    if kind == "directory":
        out.mkdir()
        (out / "precious").write_text("served right now")
    elif kind == "file":
        out.write_text("precious")
    else:
        out.symlink_to(out.parent / "nowhere")
    before = sorted(path.lstat().st_mtime_ns for path in out.parent.rglob("*"))

    with pytest.raises(OutputExists, match="already there"):
        run(qlora, base, out)

    assert sorted(path.lstat().st_mtime_ns for path in out.parent.rglob("*")) == before


def test_a_destination_that_appears_meanwhile_is_not_replaced(qlora: Path, base: Path, out: Path) -> None:
    def another_publishes(step: str, done: int, total: int) -> None:
        out.mkdir(exist_ok=True)

    with pytest.raises(OutputExists):
        convert(Request(qlora, base, out, name="tiny", measure=False), another_publishes)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError], ids=lambda error: error.__name__)
def test_an_interruption_leaves_nothing(qlora: Path, base: Path, out: Path, error: type[BaseException]) -> None:
    def interrupt(step: str, done: int, total: int) -> None:
        if done == 5:
            assert any(out.parent.iterdir())
            raise error

    with pytest.raises(error):
        convert(Request(qlora, base, out, name="tiny", measure=False), interrupt)

    assert list(out.parent.iterdir()) == []


def test_a_disk_that_fills_up_is_reported_and_leaves_nothing(qlora: Path, base: Path, out: Path) -> None:
    def full(step: str, done: int, total: int) -> None:
        if done == 5:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputUnwritable, match="No space left"):
        convert(Request(qlora, base, out, name="tiny", measure=False), full)

    assert list(out.parent.iterdir()) == []


SLOW = """
import sys, time
from pathlib import Path
from tests.convert.asking import Request, convert
def slow(what, done, total):
    print(done, flush=True)
    time.sleep(0.2)
convert(Request(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), name="tiny", measure=False), slow)
"""


def test_a_killed_process_publishes_nothing_and_the_next_one_cleans_up(qlora: Path, base: Path, out: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", SLOW, qlora, base, out], stdout=subprocess.PIPE)
    assert process.stdout
    while process.stdout.readline() != b"3\n":
        assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()

    left = [path.name for path in out.parent.iterdir()]
    assert left == [".tiny.partial"]
    run(qlora, base, out).verify()
    assert [path.name for path in out.parent.iterdir()] == ["tiny"]


@pytest.mark.parametrize("signal_name", ["SIGTERM", "SIGINT"])
def test_a_stopped_command_in_which_nothing_is_finished_leaves_nothing(
    qlora: Path, base: Path, out: Path, signal_name: str
) -> None:
    command = ["run", qlora, "--base", base, "--out", out]
    # Slowed down in the middle of writing, so that the signal arrives there.
    program = (
        "import runpy, signal, sys, time, convert.safetensors_io.shards as m; w = m.ShardWriter.append\n"
        # A shell starts background jobs with Ctrl-C ignored, and the tests may be one.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def slow(*a):\n    time.sleep(0.3); w(*a)\n"
        f"m.ShardWriter.append = slow; sys.argv = {['convert', *map(str, command)]!r}\n"
        "runpy.run_module('convert', run_name='__main__')"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not any(out.parent.glob(".tiny.partial/model/model.safetensors")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(getattr(signal, signal_name))
    _, errors = process.communicate(timeout=60)

    assert process.returncode != 0
    assert b"Traceback" not in errors
    assert list(out.parent.iterdir()) == []
