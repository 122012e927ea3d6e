"""What a user gives by mistake: the error names what it is, and what to give instead."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest

from convert.errors import BaseUnreadable, CheckpointUnreadable
from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel
from tests.convert import parts

GGUF = b"GGUF" + bytes(60)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * b"0" + b"\nsize 4096\n"


def refusal_of_base(path: Path) -> str:
    with pytest.raises(BaseUnreadable) as refusal:
        BaseModel.open(path)
    return str(refusal.value)


def refusal_of_checkpoint(path: Path) -> str:
    with pytest.raises(CheckpointUnreadable) as refusal:
        Checkpoint.open(path)
    return str(refusal.value)


def test_only_a_name_of_the_hub_is_answered_with_how_to_download_it(tmp_path: Path) -> None:
    assert "hf download acme/tiny --local-dir DIR" in refusal_of_base(Path("acme/tiny"))
    assert "hf download acme/tiny --local-dir DIR" in refusal_of_checkpoint(Path("acme/tiny"))
    for path in (tmp_path / "nope", Path("/nope"), Path("../nope"), Path("tests/nope")):
        assert f"{path} does not exist" in refusal_of_base(path)
        assert "hf download" not in refusal_of_base(path) + refusal_of_checkpoint(path)


def test_a_gguf_file_is_named_wherever_it_is_given(base: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "model.gguf").write_bytes(GGUF)
    copied = parts.copy(base, tmp_path / "copy")
    (copied / "model.safetensors").write_bytes(GGUF)

    for path in (alone, alone / "model.gguf", copied):
        assert "is a GGUF file, the format of llama.cpp" in refusal_of_base(path)
        assert "hf download" not in refusal_of_base(path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize(
    ("content", "says"), [(LFS, "git lfs pull"), (b"<!DOCTYPE html><html>", "the download failed")]
)
def test_a_file_that_was_not_fetched_is_called_what_it_is(
    base: Path, tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    copied = parts.copy(base, tmp_path / "copy")
    (copied / name).write_bytes(content)

    assert f"{name} is a " in refusal_of_base(copied)
    assert says in refusal_of_base(copied)


def hub_cache(source: Path, directory: Path, repository: str) -> Path:
    """As huggingface_hub lays it out: refs/main names the snapshot. Returns the snapshot."""
    root = directory / repository
    for commit in ("aaa", "bbb"):
        shutil.copytree(source, root / "snapshots" / commit)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("bbb")
    return root / "snapshots" / "bbb"


def test_the_root_of_a_hub_cache_points_to_its_snapshot(base: Path, lora: Path, tmp_path: Path) -> None:
    model = hub_cache(base, tmp_path / "hub", "models--acme--tiny")
    adapter = hub_cache(lora, tmp_path / "hub", "models--acme--tuned")

    for path in (tmp_path / "hub", tmp_path / "hub" / "models--acme--tiny"):
        assert f"hub cache. Give the snapshot in it: {model}" in refusal_of_base(path)
    for path in (tmp_path / "hub", tmp_path / "hub" / "models--acme--tuned"):
        assert f"hub cache. Give the snapshot in it: {adapter}" in refusal_of_checkpoint(path)


@pytest.mark.parametrize("beside", [(), ("config.json",), ("adapter_config.json",)], ids=str)
def test_the_directory_of_a_run_points_to_its_last_checkpoint(
    lora: Path, tmp_path: Path, beside: tuple[str, ...]
) -> None:
    run = tmp_path / "my run"
    for step in (800, 2390):
        shutil.copytree(lora, run / f"checkpoint-{step}")
    for name in beside:
        (run / name).write_text("{}")

    last, first = (shlex.quote(str(run / f"checkpoint-{step}")) for step in (2390, 800))
    assert f"Give one checkpoint of it: {last}, {first}" in refusal_of_checkpoint(run)


def test_an_adapter_given_as_base_is_called_one(lora: Path) -> None:
    assert f"{lora} holds an adapter, not its base" in refusal_of_base(lora)


@pytest.mark.parametrize("shape", [None, (0,), (0, 64)])
def test_what_deepspeed_left_in_pieces_is_called_so_once(lora: Path, tmp_path: Path, shape: tuple[int, ...]) -> None:
    import torch

    copied = parts.copy(lora, tmp_path / "copy")
    parts.edit_weights(copied, lambda ts: {name: torch.zeros(shape) for name in ts} if shape else {})
    (copied / "global_step100").mkdir()

    (problem,) = Checkpoint.open(copied).problems

    assert "DeepSpeed ZeRO-3 left the weights in pieces (global_step100)" in problem
    assert "Gather them with zero_to_fp32.py" in problem


def test_an_empty_saved_weight_is_not_blamed_on_its_type(lora: Path, tmp_path: Path) -> None:
    import torch

    copied = parts.copy(lora, tmp_path / "copy")
    parts.edit_json(copied / "adapter_config.json", modules_to_save=["lm_head"])
    parts.edit_weights(copied, lambda ts: ts | {"base_model.model.lm_head.weight": torch.zeros(0)})

    (problem,) = Checkpoint.open(copied).problems

    assert "'base_model.model.lm_head.weight' and 0 more tensors are empty" in problem
    assert "Gather them" in problem
