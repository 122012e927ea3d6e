"""However large a weight is, only blocks of it are in memory.

The budget: the adapter, twice the largest tensor as it is stored in the base, and 256 MB; measured as the growth of
the resident set's peak (VmHWM: getrusage's would include the parent of the process) over what it was when everything
had been imported.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.artifact import size_bytes
from tests.convert import parts

MEASURED = """
import sys
from pathlib import Path
import bitsandbytes.functional, torch
from tests.convert.asking import Request, convert
from convert.detection.training import Training
checkpoint, base, out = map(Path, sys.argv[1:4])
trained_on = Training(sys.argv[4])
def resident(line):
    return 1024 * int(Path("/proc/self/status").read_text().partition(f"{line}:")[2].split()[0])
before = resident("VmRSS")
convert(Request(checkpoint, base, out, "tiny", route="merge", quantize="none", trained_on=trained_on, measure=False))
print(resident("VmHWM") - before)
"""
ROWS, COLUMNS = 20_480, 4096


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose MLP, of which the adapter changes every matrix, is 80 times as large as a block."""
    home = tmp_path_factory.mktemp("large")
    base = parts.save_base(home / "base", tied=True, layers=1)
    tensors = load_file(base / "model.safetensors")
    torch.manual_seed(1)
    for name, shape in {"gate_proj": (ROWS, COLUMNS), "up_proj": (ROWS, COLUMNS)}.items():
        tensors[f"model.layers.0.mlp.{name}.weight"] = (0.02 * torch.randn(shape)).to(torch.bfloat16)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return home


@pytest.fixture(scope="module")
def adapter(large: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = parts.mark_lora(parts.save_adapter(parts.save_base(large / "small", tied=True, layers=1), large / "lora"))
    wide = {f"base_model.model.model.layers.0.mlp.{name}" for name in ("gate_proj", "up_proj")}

    def widened(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for module in wide:
            tensors[f"{module}.lora_A.weight"] = torch.randn(8, COLUMNS) / 64
            tensors[f"{module}.lora_B.weight"] = torch.randn(ROWS, 8) / 64
        return tensors

    parts.edit_weights(small, widened)
    return small


@pytest.fixture(scope="module")
def large_nf4(large: Path) -> Path:
    """Its MLP stored as NF4, without a model that transformers could load."""
    from convert.quantization.nf4 import Nf4

    settings = Nf4()
    tensors = load_file(large / "base" / "model.safetensors")
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        linear = "_proj." in name
        stored |= settings.quantize(name.removesuffix(".weight"), tensor) if linear else {name: tensor}
    directory = parts.copy(large / "base", large / "nf4")
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    parts.edit_json(directory / "config.json", quantization_config=settings.config())
    return directory


@pytest.mark.parametrize("training", ["lora", "qlora"])
def test_peak_memory_does_not_grow_with_the_size_of_a_weight(
    large: Path, large_nf4: Path, adapter: Path, out: Path, training: str
) -> None:
    base = large / "base" if training == "lora" else large_nf4
    words = [sys.executable, "-c", MEASURED, adapter, base, out, training]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout)

    weight = ROWS * COLUMNS * 2
    assert peak < size_bytes(adapter) + 2 * weight + 256e6
    # What it really takes: blocks, one module's halves, and of NF4 the scales. Not one whole weight.
    assert peak < weight, f"{peak / 1e6:.0f} MB"
