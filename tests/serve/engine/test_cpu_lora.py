"""Adapters by group, against a float64 product for every row, and against vLLM's own way with one adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from serve.engine.cpu_lora import CpuWorker, GroupedAdapters

SLOTS, RANK, IN_FEATURES = 5, 4, 24
OUT_FEATURES = (16, 8, 8)  # of the layers that one call is for, as of q, k and v
TOKENS = {
    "one adapter": [2] * 9,
    "nobody": [-1] * 3,
    "a prompt of each": [0] * 7 + [3] * 9,
    "two that alternate": [1, 4] * 6,
    "all different": [3, 0, 4, 1, 2],
    "all different, and nobody": [3, -1, 4, -1, -1, 2],
    "one beside nobody": [-1, 2, 2, -1, 2, 2, 2],
    "a single token": [4],
}


@dataclass
class Mapping:
    """vLLM's LoRAMapping; ids are slots + 1, 0 is no adapter."""

    index_mapping: tuple[int, ...]
    prompt_mapping: tuple[int, ...]
    is_prefill: bool


def prepared(wrapper: PunicaWrapperCPU, slots: Sequence[int], is_prefill: bool = False) -> PunicaWrapperCPU:
    ids = tuple(slot + 1 for slot in slots)
    wrapper.update_metadata(Mapping(ids, ids, is_prefill), [slot + 1 for slot in range(SLOTS)], SLOTS, 100)
    return wrapper


def wrapper_of(kind: type[PunicaWrapperCPU]) -> PunicaWrapperCPU:
    return kind(64, 16, "cpu")


def factors(*shapes: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(torch.randn(SLOTS, 1, *shape).to(dtype) for shape in shapes)


def row_by_row(
    y: Tensor, x: Tensor, downs: Sequence[Tensor], ups: Sequence[Tensor], slots: Sequence[int], scale: float
) -> Tensor:
    """The definition, in float64."""
    expected = y.double()
    for row, slot in enumerate(slots):
        if slot >= 0:
            added = [up[slot, 0].double() @ (down[slot, 0].double() @ x[row].double()) for down, up in zip(downs, ups)]  # noqa: B905
            expected[row] += scale * torch.cat(added)
    return expected


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("is_prefill", [True, False], ids=["prompts", "tokens"])
@pytest.mark.parametrize("slots", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_every_row_of_a_layer_gets_its_own_adapter_and_those_of_no_adapter_none(
    slots: list[int], is_prefill: bool, dtype: torch.dtype, close: float
) -> None:
    wrapper = prepared(wrapper_of(GroupedAdapters), slots, is_prefill)
    downs = factors(*((RANK, IN_FEATURES),) * 3, dtype=dtype)
    ups = factors(*((size, RANK) for size in OUT_FEATURES), dtype=dtype)
    x, y = torch.randn(len(slots), IN_FEATURES).to(dtype), torch.randn(len(slots), sum(OUT_FEATURES)).to(dtype)
    expected = row_by_row(y, x, downs, ups, slots, 0.5)

    wrapper.add_lora_linear(y, x, downs, ups, 0.5, OUT_FEATURES)

    assert torch.allclose(y.double(), expected, rtol=close, atol=close * float(expected.abs().max()))


@pytest.mark.parametrize("slots", TOKENS.values(), ids=TOKENS)
def test_the_two_products_can_be_taken_apart(slots: list[int]) -> None:
    """As layers do that are sharded fully: what is between is gathered from all of them."""
    wrapper = prepared(wrapper_of(GroupedAdapters), slots)
    downs = factors(*((RANK, IN_FEATURES),) * 3, dtype=torch.float32)
    ups = factors(*((size, RANK) for size in OUT_FEATURES), dtype=torch.float32)
    x, y = torch.randn(len(slots), IN_FEATURES), torch.randn(len(slots), sum(OUT_FEATURES))
    expected = row_by_row(y, x, downs, ups, slots, 2.0)
    between = torch.zeros(3, len(slots), RANK)

    wrapper.add_shrink(between, x, downs, 2.0)
    wrapper.add_expand(y, between, ups, OUT_FEATURES)

    assert torch.allclose(y.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("slots", TOKENS.values(), ids=TOKENS)
def test_embeddings_and_logits_get_their_adapters_too(slots: list[int]) -> None:
    wrapper = prepared(wrapper_of(GroupedAdapters), slots)
    (down,), (up,) = factors((RANK, IN_FEATURES), dtype=torch.float32), factors((12, RANK), dtype=torch.float32)
    x = torch.randn(len(slots), IN_FEATURES)
    looked_up, embedded = torch.randn(len(slots), RANK), torch.randn(len(slots), 12)
    identity = torch.eye(RANK).expand(SLOTS, 1, RANK, RANK)
    expected = row_by_row(embedded, looked_up, [identity], [up], slots, 1.0)
    logits = torch.randn(len(slots), 10)  # fewer than the factor is padded to
    expected_logits = row_by_row(logits, x, [down], [up[:, :, :10]], slots, 0.5)

    wrapper.add_lora_embedding(embedded, looked_up, up)
    wrapper.add_lora_logits(logits, x, down, up, 0.5)

    assert torch.allclose(embedded.double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.allclose(logits.double(), expected_logits, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("is_prefill", [True, False], ids=["prompts", "tokens"])
def test_results_are_rounded_as_in_vllm(is_prefill: bool) -> None:
    slots = TOKENS["a prompt of each"]
    downs = factors(*((RANK, IN_FEATURES),) * 3, dtype=torch.bfloat16)
    ups = factors(*((size, RANK) for size in OUT_FEATURES), dtype=torch.bfloat16)
    x, y = torch.randn(len(slots), IN_FEATURES).bfloat16(), torch.randn(len(slots), sum(OUT_FEATURES)).bfloat16()
    ours, theirs = y.clone(), y.clone()

    prepared(wrapper_of(GroupedAdapters), slots, is_prefill).add_lora_linear(ours, x, downs, ups, 1.0, OUT_FEATURES)
    prepared(wrapper_of(PunicaWrapperCPU), slots, is_prefill).add_lora_linear(theirs, x, downs, ups, 1.0, OUT_FEATURES)

    differing = (ours != theirs).float().mean()
    assert differing < 0.02, "more than the order of a sum explains"


def test_the_wrapper_that_vllms_layers_have_is_changed_itself() -> None:
    wrapper = wrapper_of(PunicaWrapperCPU)

    worker_with(wrapper).group_adapters()

    assert isinstance(wrapper, GroupedAdapters)


def test_a_vllm_that_calls_its_functions_otherwise_is_not_served_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(PunicaWrapperCPU, "add_lora_linear")
    monkeypatch.delattr("vllm.lora.punica_wrapper.punica_base.PunicaWrapperBase.add_lora_linear")
    monkeypatch.delattr("vllm.lora.punica_wrapper.punica_base.PunicaWrapperABC.add_lora_linear")

    with pytest.raises(RuntimeError, match="has no add_lora_linear, which Graft overrides"):
        worker_with(SimpleNamespace()).group_adapters()


def test_a_vllm_without_a_wrapper_to_replace_is_an_error() -> None:
    worker = worker_with(SimpleNamespace())
    worker.model_runner.lora_manager._adapter_manager.punica_wrapper_mapping.clear()

    with pytest.raises(RuntimeError, match="no Punica wrapper"):
        worker.group_adapters()


def worker_with(wrapper: object) -> CpuWorker:
    """With what the worker of an engine has."""
    worker = CpuWorker()
    manager = SimpleNamespace(punica_wrapper_mapping={"language_model": wrapper})
    worker.model_runner = SimpleNamespace(lora_manager=SimpleNamespace(_adapter_manager=manager))
    return worker
