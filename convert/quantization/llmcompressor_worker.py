"""The program that calls llm-compressor, in a process of its own with its own packages: see `llmcompressor`.

It is run as a file and imports nothing else of `convert`. The first line of standard input is the request, a JSON
object:

    model, out   directories          method   "gptq" or "awq"
    group        a quantization group of compressed-tensors: targets, weights, activations
    ignore       names of linear layers that are not quantized
    dtype        torch's name of the type that is written
    rows         lists of token ids; they are used as they are, in this order

Standard output has JSON objects, one a line: {"step": n, "of": m} during calibration, and at the end
{"library": "llm-compressor 0.14.0.1"}. Everything that the libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

_SEED = 0
_RECIPE = "recipe.yaml"


def main() -> None:
    request = json.loads(sys.stdin.readline())
    with os.fdopen(os.dup(1), "w") as stdout:
        os.dup2(2, 1)

        def send(message: dict[str, Any]) -> None:
            stdout.write(json.dumps(message) + "\n")
            stdout.flush()

        quantize(request, send)
        send({"library": f"llm-compressor {version('llmcompressor')}"})


def quantize(request: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
    """Calibrate, quantize and save weights and configuration."""
    import torch
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    torch.manual_seed(_SEED)
    # bfloat16 products are several times slower than float32 on most CPUs.
    dtype = "auto" if torch.cuda.is_available() else torch.float32
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=dtype, local_files_only=True)
    _report_steps(model.config.num_hidden_layers, send)
    oneshot(model=model, recipe=_recipe(request), dataset=_rows(request["rows"]))
    _save(model, Path(request["out"]), getattr(torch, request["dtype"]))


def _recipe(request: dict[str, Any]) -> list[Any]:
    from compressed_tensors.quantization import QuantizationScheme

    settings: dict[str, Any] = {
        "config_groups": {"group_0": QuantizationScheme.model_validate(request["group"])},
        "ignore": request["ignore"],
    }
    if request["method"] == "gptq":
        from llmcompressor.modifiers.gptq import GPTQModifier

        return [GPTQModifier(**settings)]
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    _allow_awq_without_accelerator()
    return [AWQModifier(), QuantizationModifier(**settings)]


def _rows(rows: list[list[int]]) -> Any:
    """Each row is one batch, so that nothing is padded, cut or shuffled."""
    import torch

    batches = [{"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=int)} for row in rows]
    return torch.utils.data.DataLoader(batches, batch_size=None, shuffle=False)


def _allow_awq_without_accelerator() -> None:
    """AWQ pins memory for copies to an accelerator. Without one torch raises an error, and pinning isn't needed."""
    import torch
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda self, *_, **__: None


def _report_steps(layers: int, send: Callable[[dict[str, Any]], None]) -> None:
    """Send a step for each layer: llm-compressor ends an epoch after each layer, and one more after the last."""
    from llmcompressor.core import LifecycleCallbacks

    end_of_layer, done = LifecycleCallbacks.sequential_epoch_end, 0

    def end_and_send(*arguments: Any, **options: Any) -> Any:
        nonlocal done
        result = end_of_layer(*arguments, **options)
        done = min(done + 1, layers)
        send({"step": done, "of": layers})
        return result

    LifecycleCallbacks.sequential_epoch_end = end_and_send


def _save(model: Any, out: Path, dtype: Any) -> None:
    model.to(dtype)
    model.save_pretrained(out, save_compressed=True, max_shard_size="2GB")
    # The recipe repeats the settings of config.json and of the manifest.
    (out / _RECIPE).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
