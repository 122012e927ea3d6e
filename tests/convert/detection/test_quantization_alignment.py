"""What was trained on what, measured: on adapters that were really trained, on the one or the other."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.base_model import BaseModel
from convert.checkpoint import Checkpoint
from convert.detect import Training
from convert.errors import BaseMismatch
from convert.nf4 import Nf4
from convert.progress import silent
from convert.provenance import alignment, measured
from tests.convert import parts


def random_rows(count: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, parts.VOCABULARY, (24,), generator=generator).tolist() for _ in range(count)]


def rows_of(model: Any, count: int) -> list[list[int]]:
    """Text that a model writes itself: no other function has a smaller loss on it."""
    torch.manual_seed(4)
    start = torch.randint(0, parts.VOCABULARY, (count, 1))
    written = model.generate(start, max_new_tokens=32, min_new_tokens=32, do_sample=True, top_k=0)
    return [row.tolist() for row in written]


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
    marked = measured(Checkpoint.open(on_4_bits), BaseModel.open(base), None, silent)
    unmarked = measured(Checkpoint.open(on_full), BaseModel.open(base), None, silent)

    assert (marked.verdict, marked.decided_by) == (Training.QLORA, "weights")
    assert marked.z > 4 > marked.control
    assert (unmarked.verdict, unmarked.decided_by) == (Training.UNKNOWN, None)
    assert abs(unmarked.z) < 4
    assert (marked.loss_full, marked.rows) == (None, 0)
    assert "so it was trained against the 4-bit weights" in marked.lines[0]
    assert "says nothing" in unmarked.lines[0]


def test_the_statistic_is_the_one_computed_by_hand(qlora: Path, base: Path) -> None:
    checkpoint, opened = Checkpoint.open(qlora), BaseModel.open(base)

    found = alignment(checkpoint, opened, Nf4(), silent)

    full, four_bit = parts.load_float32(base), parts.dequantized_model(base)
    products = []
    for pair in checkpoint.pairs.values():
        a, b = checkpoint.read(pair)
        error = full.get_submodule(pair.module).weight - four_bit.get_submodule(pair.module).weight
        products.append((pair.scaling * (b.double() @ a.double()) * error.detach().double()).flatten())
    product = torch.cat(products)
    assert found.z == pytest.approx(float(product.sum() / product.square().sum().sqrt()), abs=1e-4)


def test_an_adapter_that_knows_nothing_of_the_error_has_a_z_of_variance_1(base: Path, tmp_path: Path) -> None:
    adapter, found = parts.save_adapter(base, tmp_path / "adapter"), []
    for seed in range(24):
        torch.manual_seed(seed)
        parts.edit_weights(adapter, lambda halves: {name: torch.randn_like(half) for name, half in halves.items()})
        found.append(alignment(Checkpoint.open(adapter), BaseModel.open(base), Nf4(), silent).z)

    assert abs(sum(found)) / math.sqrt(len(found)) < 3
    assert 0.5 < sum(z * z for z in found) / len(found) < 2


def test_the_better_function_decides_where_the_weights_say_nothing(qlora: Path, base: Path) -> None:
    """Text written by the one function: on which the other must be worse."""
    checkpoint, opened = Checkpoint.open(qlora), BaseModel.open(base)
    of_4_bits = rows_of(parts.with_adapter(parts.dequantized_model(base), qlora), 24)
    of_full = rows_of(parts.with_adapter(parts.load_float32(base), qlora), 24)

    on_4_bits = measured(checkpoint, opened, of_4_bits, silent)
    on_full = measured(checkpoint, opened, of_full, silent)

    assert (on_4_bits.verdict, on_4_bits.decided_by) == (Training.QLORA, "function")
    assert (on_full.verdict, on_full.decided_by) == (Training.LORA, "function")
    assert "significantly better on full-precision weights, on this text" in on_full.lines[1]


def test_the_losses_are_those_of_pefts_models(qlora: Path, base: Path) -> None:
    rows = random_rows(9)

    found = measured(Checkpoint.open(qlora), BaseModel.open(base), rows, silent)

    def losses(model: Any) -> torch.Tensor:
        adapted = parts.with_adapter(model, qlora)
        with torch.inference_mode():
            return torch.stack([adapted(row[None], labels=row[None]).loss for row in torch.tensor(rows)])

    full, four_bit = losses(parts.load_float32(base)), losses(parts.dequantized_model(base))
    difference = (full - four_bit).double()
    assert found.loss_full == pytest.approx(float(full.mean()), rel=1e-5)
    assert found.loss_4bit == pytest.approx(float(four_bit.mean()), rel=1e-5)
    assert found.t == pytest.approx(float(difference.mean() / difference.std() * 3), rel=1e-2)
    assert found.rows == 9


@pytest.mark.parametrize("count", [0, 1, 7])
def test_few_rows_decide_nothing(qlora: Path, base: Path, count: int) -> None:
    rows = rows_of(parts.with_adapter(parts.dequantized_model(base), qlora), 8)[:count]

    found = measured(Checkpoint.open(qlora), BaseModel.open(base), rows, silent)

    assert (found.verdict, found.decided_by) == (Training.UNKNOWN, None)


def test_a_4_bit_base_alone_cannot_tell(qlora: Path, nf4_base: Path) -> None:
    with pytest.raises(BaseMismatch, match="takes the full-precision base"):
        measured(Checkpoint.open(qlora), BaseModel.open(nf4_base), None, silent)
