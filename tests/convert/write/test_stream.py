"""Weights in blocks are the weights: no bit depends on the number of threads, and nothing is lost between blocks."""

from __future__ import annotations

import math
import threading
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.artifact import file_sha256
from convert.errors import BaseUnreadable, FormatRefused
from convert.inputs.base_model import BaseModel
from convert.quantization.nf4 import Nf4
from convert.safetensors_io.prefetch import prefetched
from convert.safetensors_io.reader import TensorReader
from convert.safetensors_io.tensors import Tensors, TensorSpec
from convert.write.blocks import Buffers, rows_per_block
from convert.write.row_sources import FloatRows, Nf4Rows
from convert.write.stream import compute_blocks
from convert.write.tasks import MergeTask, require_finite
from tests.convert import parts

SHAPE = (700, 3072)  # three blocks, the last one smaller
SCALE = 1.7


def merged(tensors: Tensors, task: MergeTask, shape: tuple[int, ...]) -> torch.Tensor:
    buffers, pieces = Buffers(), []
    with TensorReader(tensors) as reader:
        for _, _, block in compute_blocks([task], reader, buffers):
            pieces.append(bytes(block.bytes))
            buffers.release(block.buffer)
    return torch.frombuffer(bytearray(b"".join(pieces)), dtype=torch.bfloat16).reshape(shape)


def lora_weights(shape: tuple[int, int] = SHAPE) -> tuple[torch.Tensor, torch.Tensor, float]:
    torch.manual_seed(2)
    return torch.randn(16, shape[1]) / 50, torch.randn(shape[0], 16) / 50, SCALE


@pytest.fixture
def stored(tmp_path: Path) -> Tensors:
    torch.manual_seed(1)
    save_file({"w": (0.02 * torch.randn(SHAPE)).to(torch.bfloat16)}, tmp_path / "model.safetensors")
    return Tensors.open(tmp_path, "model", BaseUnreadable)


def test_blocks_give_the_correctly_rounded_float64_sum(stored: Tensors) -> None:
    result = merged(stored, MergeTask(FloatRows(stored.specs["w"]), stored.specs["w"], lora_weights), SHAPE)

    a, b, scale = lora_weights()
    weight = stored.read("w").double()
    exact = (weight + scale * (b.double() @ a.double())).to(torch.bfloat16)
    assert rows_per_block(SHAPE) < SHAPE[0] / 2
    assert float((result == exact).double().mean()) > 0.9999
    # A step of bfloat16 at the size of what was added up: where the two cancel out, the sum's own steps are finer.
    step = 2**-7 * torch.maximum(weight.abs(), exact.double().abs())
    assert bool(((result.double() - exact.double()).abs() <= step).all())


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_no_bit_depends_on_the_number_of_threads(stored: Tensors, threads: int) -> None:
    def result() -> torch.Tensor:
        return merged(stored, MergeTask(FloatRows(stored.specs["w"]), stored.specs["w"], lora_weights), SHAPE)

    expected, before = result(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(result(), expected)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(700, 3072), (40_000, 48), (5, 32)])
def test_nf4_in_blocks_is_its_codes_times_their_scales(tmp_path: Path, shape: tuple[int, int], double: bool) -> None:
    from types import SimpleNamespace
    from typing import Any, cast

    from bitsandbytes.functional import dequantize_blockwise, quantize_4bit

    torch.manual_seed(4)
    weight = 0.02 * torch.randn(shape)
    settings = Nf4(double)
    save_file(settings.quantize("m", weight), tmp_path / "model.safetensors")
    tensors = Tensors.open(tmp_path, "model", BaseUnreadable)
    linear = SimpleNamespace(weight="m.weight", module="m", shape=shape, in_features=shape[1])
    base = SimpleNamespace(tensors=tensors, stored_specs=lambda linear: tuple(tensors.specs.values()))
    source = Nf4Rows(cast("Any", base), cast("Any", linear), settings)

    result = merged(tensors, MergeTask(source, TensorSpec("m.weight", "BF16", shape), None), shape)

    codes, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
    scales = dequantize_blockwise(state.absmax, state.state2) + state.offset if double else state.absmax
    packed = codes.flatten().long()
    values = state.code[torch.stack([packed >> 4, packed & 15], dim=1).flatten()]
    expected = (values * scales.repeat_interleave(64)[: values.numel()]).view(shape)
    assert torch.equal(result, expected.to(torch.bfloat16))
    assert torch.equal(settings.dequantize("m", {name: tensors.read(name) for name in tensors.specs}), expected)


def test_a_block_begins_where_a_group_of_nf4_weights_with_one_scale_does() -> None:
    for columns in (1, 2, 48, 63, 64, 100, 3072, 8192, 3_000_000):
        rows = rows_per_block((10, columns))
        assert rows >= 1
        assert rows * columns % 64 == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3.4e38])
@pytest.mark.parametrize("place", [(0, 0), (SHAPE[0] - 1, SHAPE[1] - 1)], ids=["first", "last"])
def test_one_weight_that_is_not_finite_is_found(tmp_path: Path, value: float, place: tuple[int, int]) -> None:
    weight = torch.zeros(SHAPE)
    weight[place] = value
    save_file({"w": weight}, tmp_path / "model.safetensors")
    tensors = Tensors.open(tmp_path, "model", BaseUnreadable)

    error, says = (FormatRefused, "w: the sum .* too large") if value == 3.4e38 else (BaseUnreadable, "w holds NaN or")
    with pytest.raises(error, match=says):
        merged(tensors, MergeTask(FloatRows(tensors.specs["w"]), TensorSpec("w", "BF16", SHAPE), None), SHAPE)


def test_what_rounds_to_the_largest_float16_is_finite_and_what_rounds_beyond_is_not() -> None:
    require_finite("w", torch.tensor([65_519.0, -65_519.0]), torch.float16)
    with pytest.raises(FormatRefused):
        require_finite("w", torch.tensor([65_520.0]), torch.float16)


def test_whole_numbers_are_finite() -> None:
    require_finite("w", torch.tensor([2**62, -(2**62)]))


def test_files_are_hashed_in_whatever_order_they_are_read(tmp_path: Path) -> None:
    tensors = {name: torch.randn(1000) for name in "abc"}
    save_file(tensors, tmp_path / "model.safetensors")
    opened = Tensors.open(tmp_path, "model", BaseUnreadable)
    for order in ("abc", "cab", "b", ""):
        with TensorReader(opened) as reader:
            for name in order:
                view = bytearray(4000)
                reader.read_into(memoryview(view)[:1000], name, 0)
                reader.read_into(memoryview(view)[1000:], name, 1000)
                assert torch.equal(torch.frombuffer(view, dtype=torch.float32), tensors[name])
            assert reader.digests() == {"model.safetensors": file_sha256(tmp_path / "model.safetensors")}


def test_a_base_that_shrinks_while_it_is_read_is_reported(tmp_path: Path) -> None:
    save_file({"w": torch.randn(1000)}, tmp_path / "model.safetensors")
    opened = Tensors.open(tmp_path, "model", BaseUnreadable)
    with (tmp_path / "model.safetensors").open("r+b") as stream:
        stream.truncate(2000)

    with TensorReader(opened) as reader, pytest.raises(BaseUnreadable, match="became shorter while 'w'"):
        reader.read_into(memoryview(bytearray(4000)), "w", 0)


def test_the_base_s_digests_are_in_the_manifest(lora: Path, base: Path, nf4_base: Path, qlora: Path, out: Path) -> None:
    from tests.convert.asking import Request, convert

    for number, (checkpoint, given) in enumerate([(lora, base), (qlora, nf4_base)]):
        destination = out.parents[1] / str(number)
        artifact = convert(Request(checkpoint, given, destination, "tiny", "merge", "none", measure=False))
        files = {name: file_sha256(given / name) for name in ("model.safetensors", "config.json")}
        assert artifact.manifest.base
        assert artifact.manifest.base.files == files
        artifact.verify()


def test_items_come_in_order_and_an_error_at_its_place() -> None:
    def items() -> Generator[int]:
        yield from range(50)
        raise KeyError("the fifty-first")

    result = prefetched(items(), 3)
    assert [next(result) for _ in range(50)] == list(range(50))
    with pytest.raises(KeyError, match="fifty-first"):
        next(result)


def test_whoever_stops_early_leaves_no_thread_behind() -> None:
    closed = threading.Event()

    def items() -> Generator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    before = threading.active_count()
    outer = prefetched(prefetched(items(), 2), 2)
    next(outer)
    outer.close()

    assert closed.wait(10)
    assert threading.active_count() == before


def test_an_untouched_tensor_keeps_its_bytes_whatever_its_shape(lora: Path, base: Path, tmp_path: Path) -> None:
    from tests.convert.asking import Request, convert

    changed = parts.copy(base, tmp_path / "base")
    tensors = load_file(changed / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.arange(3, dtype=torch.float32)
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})

    convert(Request(lora, changed, tmp_path / "out", "tiny", "merge", "none", measure=False))

    written = load_file(tmp_path / "out" / "model" / "model.safetensors")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    assert torch.equal(written[name], tensors[name])
    assert BaseModel.open(tmp_path / "out" / "model").dtype == "BF16"
