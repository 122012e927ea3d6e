"""What Graft adds to vLLM's worker, the process part that holds the model and the KV cache."""

from __future__ import annotations

from typing import Any

import torch

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Worker:
    """Methods that vLLM adds to its worker: the `worker_extension_cls`."""

    model_runner: Any

    def clear_nonfinite(self) -> None:
        """Sets to 0 what is infinite or not a number in the KV cache.

        vLLM gives the blocks of a finished request to the next one as they are. A kernel multiplies what that one has
        not written yet with 0, and 0 times infinity is not a number: every answer from such a block would be wrong. A
        quantized cache stays as it is: each format has bytes of its own for what is no number, and some have none.
        """
        for cache in self.model_runner.kv_caches:
            for part in cache if isinstance(cache, list | tuple) else (cache,):
                if part.dtype in _FLOATS:
                    part.nan_to_num_(nan=0, posinf=0, neginf=0)
