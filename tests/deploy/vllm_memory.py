"""What a real vLLM made of a model, as JSON: python -m tests.deploy.vllm_memory MODEL CACHE_BYTES MAX_RANK SLOTS"""

from __future__ import annotations

import json
import sys
from typing import Any


def main(model: str, cache_bytes: int, max_rank: int, slots: int) -> None:
    from vllm import LLM
    from vllm.model_executor.model_loader import base_loader

    loaded = 0
    after = base_loader.process_weights_after_loading

    def weighed(model: Any, *rest: Any) -> None:
        """A CPU with AVX-512 keeps the weights of linear layers in a form of its own, which are no parameters."""
        nonlocal loaded
        loaded = sum(map(size, model.parameters()))
        after(model, *rest)

    base_loader.process_weights_after_loading = weighed
    llm = LLM(
        model=model, enforce_eager=True, max_model_len=512, kv_cache_memory_bytes=cache_bytes,
        enable_lora=True, max_lora_rank=max_rank, max_loras=slots, max_cpu_loras=slots + 1,
    )  # fmt: skip
    cache = llm.llm_engine.vllm_config.cache_config
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    measured = {
        "block_tokens": cache.block_size,
        "cached_tokens": cache.num_gpu_blocks * cache.block_size,
        "weight_bytes": loaded,
        "slot_bytes": sum(stacked(runner.model).values()) / slots,
    }
    print("\nTOLD " + json.dumps(measured))


def stacked(model: Any) -> dict[int, int]:
    """Bytes of the tensors that hold the adapters of all slots, by where they lie: modules may share them."""
    sizes = {}
    for module in model.modules():
        for name in ("lora_a_stacked", "lora_b_stacked"):
            tensors = getattr(module, name, ())
            for tensor in tensors if isinstance(tensors, tuple) else (tensors,):
                sizes[tensor.data_ptr()] = size(tensor)
    return sizes


def size(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
