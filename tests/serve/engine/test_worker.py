"""What is cleared of the KV cache, and what stays bit for bit; tests/e2e/engine does it in a real engine."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from serve.engine.worker import Worker


def cleared(*caches: object) -> None:
    worker = Worker()
    worker.model_runner = SimpleNamespace(kv_caches=list(caches))
    worker.clear_nonfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_finite_becomes_zero_and_nothing_else_changes(dtype: torch.dtype) -> None:
    # A view that is not contiguous, as caches of keys and values that lie in one tensor are.
    whole = torch.randn(2, 6, 4, dtype=torch.float32).to(dtype).transpose(0, 1)
    spoilt = whole.clone()
    spoilt[1, 0, 2], spoilt[2, 1, 0], spoilt[5, 0, 3] = math.nan, math.inf, -math.inf
    expected = torch.where(torch.isfinite(spoilt), spoilt, 0)

    cleared(spoilt, [whole])

    assert torch.equal(spoilt, expected)
    assert int((spoilt != whole).sum()) == 3


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_quantized_cache_keeps_its_bytes(dtype: torch.dtype) -> None:
    every_byte = torch.arange(256, dtype=torch.uint8)
    cache = every_byte.clone().view(dtype)

    cleared(cache)

    assert torch.equal(cache.view(torch.uint8), every_byte)
