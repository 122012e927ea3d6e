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
import bitsandbytes.functional, peft, torch, transformers.models.llama.modeling_llama
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
# Of the small model's sizes, those that become large ones.
HIDDEN, INTERMEDIATE = 64, 128


def enlarged(shape: torch.Size, name: str) -> tuple[int, ...]:
    """The shape of the small model's tensor in the large one, whose heads together are as small as before."""
    sizes = {HIDDEN: COLUMNS, INTERMEDIATE: ROWS}
    rows, *columns = shape
    rows = rows if name.endswith(("q_proj.weight", "q_proj.lora_B.weight")) else sizes.get(rows, rows)
    columns = columns if "o_proj.weight" in name or "o_proj.lora_A" in name else [sizes.get(n, n) for n in columns]
    return (rows, *columns)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose MLP, of which the adapter changes every matrix, is 80 times as large as a block."""
    home = tmp_path_factory.mktemp("large")
    base = parts.save_base(home / "base", tied=True, layers=1, hidden=HIDDEN)
    parts.edit_json(base / "config.json", hidden_size=COLUMNS, intermediate_size=ROWS, head_dim=16)
    torch.manual_seed(1)
    tensors = {
        name: (0.02 * torch.randn(enlarged(tensor.shape, name))).to(torch.bfloat16)
        for name, tensor in load_file(base / "model.safetensors").items()
    }
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return home


@pytest.fixture(scope="module")
def adapter(large: Path) -> Path:
    small = parts.save_base(large / "small", tied=True, layers=1, hidden=HIDDEN)
    lora = parts.mark_lora(parts.save_adapter(small, large / "lora"))
    parts.edit_weights(
        lora, lambda tensors: {name: torch.randn(enlarged(t.shape, name)) / 64 for name, t in tensors.items()}
    )
    return lora


@pytest.fixture(scope="module")
def large_nf4(large: Path) -> Path:
    """Its linear layers stored as NF4."""
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
