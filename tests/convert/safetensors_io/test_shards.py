from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from convert.safetensors_io.direct_io import IoThreads, UncachedFile
from convert.safetensors_io.shards import Shard, ShardWriter, index, split
from convert.safetensors_io.tensors import TensorSpec

TENSORS = {
    "z.codes": torch.arange(7, dtype=torch.uint8),
    "a.weight": torch.randn(3, 5).to(torch.bfloat16),
    "b.absmax": torch.randn(4),
    "m.weight": torch.randn(2, 2).to(torch.bfloat16),
}
SPECS = (
    TensorSpec("z.codes", "U8", (7,)),
    TensorSpec("a.weight", "BF16", (3, 5)),
    TensorSpec("b.absmax", "F32", (4,)),
    TensorSpec("m.weight", "BF16", (2, 2)),
)


def test_a_streamed_file_has_the_bytes_that_the_library_would_write(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, Shard("x.safetensors", SPECS)) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)

    assert (tmp_path / "x.safetensors").read_bytes() == save(TENSORS, {"format": "pt"})
    assert torch.equal(load_file(tmp_path / "x.safetensors")["z.codes"], TENSORS["z.codes"])


def test_a_planned_tensor_that_never_came_is_noticed(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match=r"z\.codes"),
        ShardWriter(tmp_path, Shard("x.safetensors", SPECS)) as writer,
    ):
        writer.write("a.weight", TENSORS["a.weight"])


def test_a_tensor_of_another_type_than_planned_is_noticed(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match=r"b\.absmax"),
        ShardWriter(tmp_path, Shard("x.safetensors", SPECS)) as writer,
    ):
        writer.write("b.absmax", TENSORS["b.absmax"].double())


def test_files_fill_up_to_the_limit_and_groups_stay_whole() -> None:
    groups = [[TensorSpec(f"{name}.{part}", "U8", (40,)) for part in "xy"] for name in "abc"]

    shards = split(groups, "model", limit_bytes=170)

    assert [(shard.file, len(shard.specs)) for shard in shards] == [
        ("model-00001-of-00002.safetensors", 4),
        ("model-00002-of-00002.safetensors", 2),
    ]
    assert index(shards)["metadata"] == {"total_size": 240}
    assert index(shards)["weight_map"]["c.y"] == "model-00002-of-00002.safetensors"  # type: ignore[index]


def test_tensors_below_the_limit_are_one_file() -> None:
    assert [shard.file for shard in split([SPECS], "model")] == ["model.safetensors"]


@pytest.mark.parametrize("takes", ["direct writes", "no such flag", "the flag and then no write"])
@pytest.mark.parametrize("order", ["in order", "the last first", "with a hole that is filled at last"])
def test_a_file_written_past_the_cache_has_the_bytes_and_the_digest_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str, takes: str
) -> None:
    content = random.Random(3).randbytes(21_000_001)
    pieces = [(begin, content[begin : begin + 1_234_567]) for begin in range(0, len(content), 1_234_567)]
    if order == "the last first":
        pieces.reverse()
    elif order != "in order":
        pieces.append(pieces.pop(3))
    if takes == "no such flag":
        monkeypatch.setattr("convert.safetensors_io.direct_io._open_direct", lambda path: None)
    elif takes != "direct writes":
        monkeypatch.setattr("convert.safetensors_io.direct_io.os.pwrite", without_direct_writes)

    with IoThreads() as threads:
        file = UncachedFile(tmp_path / "x", threads)
        for offset, piece in pieces:
            changing = bytearray(piece)
            file.write(offset, memoryview(changing))
            changing[:] = bytes(len(changing))  # the caller may reuse its memory at once
        digest = file.complete()
        file.close()

    assert (tmp_path / "x").read_bytes() == content
    assert digest == hashlib.sha256(content).hexdigest()


_pwrite = os.pwrite


def without_direct_writes(descriptor: int, piece: memoryview, offset: int) -> int:
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
        raise OSError(errno.EINVAL, "invalid argument")
    return _pwrite(descriptor, piece, offset)


def test_a_full_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, piece: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, "no space left")

    with IoThreads() as threads:
        file = UncachedFile(tmp_path / "x", threads)
        monkeypatch.setattr("convert.safetensors_io.direct_io.os.pwrite", full)
        file.write(4096, memoryview(bytes(5 << 20)))
        with pytest.raises(OSError, match="no space left"):
            file.complete()
        file.close()
