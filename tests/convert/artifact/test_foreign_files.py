from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from convert.artifact.foreign_files import missing_weights


def test_the_command_for_pickles_saves_every_shard(tmp_path: Path) -> None:
    directory = tmp_path / "a base's copy"
    directory.mkdir()
    shared = torch.arange(6.0).reshape(2, 3)
    shards = [{"embed": shared, "head": shared}, {"norm": torch.ones(3)}]
    for number, shard in enumerate(shards, 1):
        torch.save(shard, directory / f"pytorch_model-0000{number}-of-00002.bin")
    torch.save({}, directory / "training_args.bin")

    command = missing_weights(directory, "model.safetensors").partition("safetensors first: ")[2]
    subprocess.run(["bash", "-ec", command.replace("python", sys.executable, 1)], check=True, cwd=tmp_path)

    saved = load_file(directory / "model.safetensors")
    assert {name: tensor.tolist() for name, tensor in saved.items()} == {
        name: tensor.tolist() for shard in shards for name, tensor in shard.items()
    }


def test_weights_of_metas_own_code_are_called_so(tmp_path: Path) -> None:
    (tmp_path / "consolidated.00.pth").write_bytes(b"PK")

    assert "has the layout of Meta's own code" in missing_weights(tmp_path, "model.safetensors")
