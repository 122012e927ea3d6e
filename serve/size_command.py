"""`python -m serve size`: what fits on a GPU, before there is one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from serve.errors import StateInvalid
from serve.output import err, print_json, told_errors
from serve.size import STORED, Fit, Shape, Wish, adapter_bytes, fit, slot_bytes, token_bytes

_MIB, _GIB = 1 << 20, 1 << 30

# What nvidia-smi tells as the whole memory, in MiB.
GPUS: Mapping[str, int] = {
    "t4": 15360, "l4": 23034, "a10g": 23028, "rtx-4090": 24564, "a100-40": 40960, "l40s": 46068,
    "h100": 81559, "a100-80": 81920, "h200": 143771,
}  # fmt: skip

KNOWN: Mapping[str, Shape] = {
    "llama-3.2-1b": Shape(2048, 16, 32, 8, 64, 8192, 128256, True, 131072),
    "llama-3.2-3b": Shape(3072, 28, 24, 8, 128, 8192, 128256, True, 131072),
    "llama-3.1-8b": Shape(4096, 32, 32, 8, 128, 14336, 128256, False, 131072),
    "llama-3.3-70b": Shape(8192, 80, 64, 8, 128, 28672, 128256, False, 131072),
}


def size(
    model: Annotated[
        str,
        typer.Argument(help=f"An artifact or a model, by its directory, or one of: {', '.join(KNOWN)}."),
    ],
    gpu: Annotated[str, typer.Option(help=f"GiB of memory of one GPU, or one of: {', '.join(GPUS)}.")] = "l4",
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of one replica (tensor parallel).")] = 1,
    context: Annotated[int, typer.Option(min=1, help="Tokens of the longest request, --max-model-len.")] = 8192,
    max_lora_rank: Annotated[int, typer.Option(min=0, max=512, help="0: without adapters.")] = 16,
    max_active_adapters: Annotated[int, typer.Option(min=1, help="Engine slots.")] = 8,
    utilization: Annotated[float, typer.Option(min=0.1, max=1, help="vLLM's --gpu-memory-utilization.")] = 0.9,
    fp8_cache: Annotated[bool, typer.Option("--fp8-cache", help="One byte a value: --kv-cache-dtype=fp8.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Say what fits on a GPU: weights, adapters and KV cache, for every way in which weights can be stored.

    Weights, slots and cache are what vLLM makes of them; what computing takes is an estimate. Needs no GPU and no
    model: its config.json is enough.
    """
    with told_errors():
        shape, memory = shape_of(model), memory_of(gpu)
    fits = {
        stored: fit(
            shape,
            Wish(memory, stored, max_lora_rank, max_active_adapters, context, utilization, gpus, 1 if fp8_cache else 2),
        )
        for stored in STORED
    }
    of = {
        "token_bytes": token_bytes(shape, 1 if fp8_cache else 2),
        "adapter_bytes": adapter_bytes(shape, max_lora_rank),
        "slot_bytes": slot_bytes(shape, max_lora_rank) if max_lora_rank else 0,
    }
    if as_json:
        print_json({"memory_bytes": memory, **of, "stored": {name: asdict(it) for name, it in fits.items()}})
        return
    Console().print(_table(fits, context, f"{model} on {gpus} x {gpu}: GiB of each GPU"))
    err.print(
        f"A token of context takes {of['token_bytes'] / 1024:.0f} KiB. An adapter of rank {max_lora_rank} takes "
        f"{of['adapter_bytes'] / _MIB:.0f} MiB of the host's memory, its slot {of['slot_bytes'] / _MIB:.0f} MiB of the "
        "GPU's.",
        highlight=False,
    )


def _table(fits: Mapping[str, Fit], context: int, title: str) -> Table:
    columns = ("weights as", "weights", "slots", "computing", "KV cache", "tokens", f"requests of {context}")
    table = Table(*columns, title=title)
    for stored, it in fits.items():
        parts = (f"{part / _GIB:.2f}" for part in (it.weights, it.slots, it.working, it.cache))
        fits_one = it.sequences >= 1
        told = (f"{it.tokens:,}", f"{it.sequences:.1f}") if fits_one else ("none", "-")
        table.add_row(stored, *parts, *told)
    return table


def memory_of(gpu: str) -> int:
    """Bytes. Raises StateInvalid for what is neither a known GPU nor a number."""
    if gpu in GPUS:
        return GPUS[gpu] * _MIB
    try:
        return int(float(gpu) * _GIB)
    except ValueError as error:
        raise StateInvalid(
            f"{gpu!r} is no GPU that is known here ({', '.join(GPUS)}). Give its memory in GiB, as --gpu 24."
        ) from error


def shape_of(model: str) -> Shape:
    """Raises StateInvalid if there is no config.json of a Llama-architecture model."""
    if model in KNOWN:
        return KNOWN[model]
    found = [it for it in (Path(model) / "config.json", Path(model) / "model" / "config.json") if it.is_file()]
    if not found:
        raise StateInvalid(
            f"{model} is neither the directory of a model or an artifact nor one of: {', '.join(KNOWN)}."
        )
    return _read_shape(found[0])


def _read_shape(path: Path) -> Shape:
    try:
        config: Any = json.loads(path.read_bytes())
        return Shape.of(config)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise StateInvalid(f"{path} is no config.json of a Llama-architecture model: {error!r}.") from error
