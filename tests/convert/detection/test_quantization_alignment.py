"""Adapters that were really trained, on 4-bit or on full-precision weights: the measurement tells which."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.detection.quantization_alignment import measure_alignment, measure_training
from convert.detection.training import Training
from convert.errors import BaseMismatch
from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel
from convert.progress import silent
from convert.quantization.nf4 import Nf4
from tests.convert import parts


@pytest.fixture(scope="module")
def on_4_bits(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on the dequantized weights, on what the full-precision model says: it learns to undo the error."""
    return trained(base, parts.dequantized_model(base), tmp_path_factory.mktemp("trained") / "on-4-bits")


@pytest.fixture(scope="module")
def on_full(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(base, parts.load_float32(base), tmp_path_factory.mktemp("trained") / "on-full")


def trained(base: Path, model: Any, directory: Path) -> Path:
    from peft import LoraConfig, get_peft_model

    teacher = parts.load_float32(base)
    torch.manual_seed(3)
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=parts.LINEARS))
    optimizer = torch.optim.AdamW([half for half in adapted.parameters() if half.requires_grad], lr=5e-3)
    for _ in range(80):
        batch = torch.randint(0, parts.VOCABULARY, (8, 24))
        with torch.no_grad():
            wanted = teacher(batch).logits.softmax(-1)
        loss = torch.nn.functional.cross_entropy(adapted(batch).logits.flatten(0, 1), wanted.flatten(0, 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(directory, save_embedding_layers=False)
    return directory


def test_training_on_4_bits_leaves_its_mark_and_training_on_full_precision_none(
    on_4_bits: Path, on_full: Path, base: Path
) -> None:
    marked = measure_training(Checkpoint.open(on_4_bits), BaseModel.open(base), None, silent)
    unmarked = measure_training(Checkpoint.open(on_full), BaseModel.open(base), None, silent)

    assert (marked.training, marked.decided_by) == (Training.QLORA, "alignment")
    assert marked.confidence == f"z = {marked.alignment.z:.1f}"
    assert marked.alignment.z > 4 > marked.alignment.control
    assert (unmarked.training, unmarked.decided_by, unmarked.confidence) == (Training.UNKNOWN, None, None)
    assert abs(unmarked.alignment.z) < 4
    assert marked.losses is None
    assert "so it was trained against the 4-bit weights" in marked.sources[0]
    assert "says nothing" in unmarked.sources[0]


def test_the_statistic_is_the_one_computed_by_hand(qlora: Path, base: Path) -> None:
    checkpoint, opened = Checkpoint.open(qlora), BaseModel.open(base)

    alignment = measure_alignment(checkpoint, opened, Nf4(), silent)

    full, four_bit = parts.load_float32(base), parts.dequantized_model(base)
    products = []
    for pair in checkpoint.lora_weights.values():
        a, b = checkpoint.read(pair)
        error = full.get_submodule(pair.module).weight - four_bit.get_submodule(pair.module).weight
        products.append((pair.scaling * (b.double() @ a.double()) * error.detach().double()).flatten())
    product = torch.cat(products)
    assert alignment.z == pytest.approx(float(product.sum() / product.square().sum().sqrt()), abs=1e-4)


def test_an_adapter_that_knows_nothing_of_the_error_has_a_z_of_variance_1(base: Path, tmp_path: Path) -> None:
    adapter, z_values = parts.save_adapter(base, tmp_path / "adapter"), []
    for seed in range(24):
        torch.manual_seed(seed)
        parts.edit_weights(adapter, lambda tensors: {name: torch.randn_like(half) for name, half in tensors.items()})
        z_values.append(measure_alignment(Checkpoint.open(adapter), BaseModel.open(base), Nf4(), silent).z)

    assert abs(sum(z_values)) / math.sqrt(len(z_values)) < 3
    assert 0.5 < sum(z * z for z in z_values) / len(z_values) < 2


def test_a_4_bit_base_alone_cannot_tell(qlora: Path, nf4_base: Path) -> None:
    with pytest.raises(BaseMismatch, match="needs the full-precision base"):
        measure_training(Checkpoint.open(qlora), BaseModel.open(nf4_base), None, silent)
