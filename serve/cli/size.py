"""`python -m serve size`: what fits on a GPU, before there is one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel, ConfigDict, Field
from rich.table import Table

from serve.capacity.size import STORED, Fit, Shape, SizingRequest, adapter_bytes, fit, slot_bytes, token_bytes
from serve.cli.command import expand_options
from serve.cli.console import err, new_table, print_json, print_table, reported_errors
from serve.cli.options import AsJson
from serve.errors import StateInvalid

_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30

# The whole memory that nvidia-smi reports, in MiB.
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


class SizeOptions(BaseModel):
    """The options of `size`."""

    model_config = ConfigDict(frozen=True)

    model: Annotated[
        str, typer.Argument(help=f"An artifact or a model, by its directory, or one of: {', '.join(KNOWN)}.")
    ]
    gpu: str = Field("l4", description=f"GiB of memory of one GPU, or one of: {', '.join(GPUS)}.")
    gpus: int = Field(1, ge=1, description="GPUs of one replica (tensor parallel).")
    context: int = Field(8192, ge=1, description="Tokens of the longest request, --max-model-len.")
    max_lora_rank: int = Field(16, ge=0, le=512, description="0: without adapters.")
    max_active_adapters: int = Field(8, ge=1, description="Engine slots.")
    utilization: float = Field(0.9, ge=0.1, le=1, description="vLLM's --gpu-memory-utilization.")
    fp8_cache: bool = Field(False, description="One byte a value: --kv-cache-dtype=fp8.")
    as_json: AsJson = False

    @property
    def cache_value_bytes(self) -> int:
        return 1 if self.fp8_cache else 2

    def request(self, memory_bytes: int, stored: str) -> SizingRequest:
        return SizingRequest(
            memory_bytes, stored, self.max_lora_rank, self.max_active_adapters, self.context, self.utilization,
            self.gpus, self.cache_value_bytes,
        )  # fmt: skip


def add_to(app: typer.Typer) -> None:
    """Make `size` a command of `app`."""
    app.command()(size)


@expand_options
def size(options: SizeOptions) -> None:
    """Say what fits on a GPU: weights, adapters and KV cache, for every way in which weights can be stored.

    The sizes of weights, slots and cache are those in vLLM; the memory for computing is an estimate. The command needs
    no GPU, and of the model only its config.json.
    """
    with reported_errors():
        shape, memory_bytes = shape_of(options.model), memory_of(options.gpu)
    fits = {stored: fit(shape, options.request(memory_bytes, stored)) for stored in STORED}
    rank = options.max_lora_rank
    sizes = {
        "token_bytes": token_bytes(shape, options.cache_value_bytes),
        "adapter_bytes": adapter_bytes(shape, rank),
        "slot_bytes": slot_bytes(shape, rank) if rank else 0,
    }
    if options.as_json:
        stored = {name: asdict(fit_of_format) for name, fit_of_format in fits.items()}
        print_json({"memory_bytes": memory_bytes, **sizes, "stored": stored})
        return
    print_table(_table(fits, options.context), f"{options.model} on {options.gpus} x {options.gpu}: GiB of each GPU")
    err.print(
        f"A token of context takes {sizes['token_bytes'] / _KIB:.0f} KiB. An adapter of rank {rank} takes "
        f"{sizes['adapter_bytes'] / _MIB:.0f} MiB of the host's memory, its slot {sizes['slot_bytes'] / _MIB:.0f} MiB "
        "of the GPU's.",
        highlight=False,
    )


def _table(fits: Mapping[str, Fit], context: int) -> Table:
    columns = ("weights as", "weights", "slots", "computing", "KV cache", "tokens", f"requests of {context}")
    table = new_table(*columns)
    for stored, parts in fits.items():
        gib = (f"{part_bytes / _GIB:.2f}" for part_bytes in (parts.weights, parts.slots, parts.working, parts.cache))
        holds_a_request = parts.sequences >= 1
        room = (f"{parts.tokens:,}", f"{parts.sequences:.1f}") if holds_a_request else ("none", "-")
        table.add_row(stored, *gib, *room)
    return table


def memory_of(gpu: str) -> int:
    """The memory of a GPU in bytes. Raises StateInvalid if `gpu` is neither a known GPU nor a number of GiB."""
    if gpu in GPUS:
        return GPUS[gpu] * _MIB
    try:
        return int(float(gpu) * _GIB)
    except ValueError as error:
        raise StateInvalid(
            f"{gpu!r} is no GPU that is known here ({', '.join(GPUS)}). Give its memory in GiB, as --gpu 24."
        ) from error


def shape_of(model: str) -> Shape:
    """The shape of a model. Raises StateInvalid if there is no config.json of a Llama-architecture model."""
    if model in KNOWN:
        return KNOWN[model]
    places = (Path(model) / "config.json", Path(model) / "model" / "config.json")
    config = next((path for path in places if path.is_file()), None)
    if config is None:
        raise StateInvalid(
            f"{model} is neither the directory of a model or an artifact nor one of: {', '.join(KNOWN)}."
        )
    return _read_shape(config)


def _read_shape(path: Path) -> Shape:
    try:
        config: Any = json.loads(path.read_bytes())
        return Shape.of(config)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise StateInvalid(f"{path} is no config.json of a Llama-architecture model: {error!r}.") from error
