"""The files of an adapter read as untrusted input: no library parses them before these checks have passed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.errors import AdapterRejected

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_FILES = (CONFIG, WEIGHTS)

_MAX_CONFIG_BYTES = 1 << 20
_MAX_HEADER_BYTES = 64 << 20
_SCAN_BYTES = 8 << 20
_FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight")
_WEIGHT_KINDS = ("weight", "weight_packed", "qweight")
_NF4_STATE = ".weight.quant_state.bitsandbytes__nf4"
# bytes of one number, and the bits of its exponent: all of them set is an infinity or not a number
_FLOATS = {"F32": (4, 0x7F80_0000), "F16": (2, 0x7C00), "BF16": (2, 0x7F80)}
_SIZES = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1,
          "F8_E4M3": 1, "F8_E5M2": 1} | {name: size for name, (size, _) in _FLOATS.items()}  # fmt: skip

# What vLLM loads without a word and computes otherwise than PEFT does, or not at all.
_IGNORED_BY_VLLM = (
    "fan_in_fan_out",
    "target_parameters",
    "alora_invocation_tokens",
    "use_qalora",
    "trainable_token_indices",
)


@dataclass(frozen=True)
class Tensor:
    """One tensor's place in a safetensors file; offsets in bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises AdapterRejected unless every one lies within the file with as many
    bytes as its shape needs, one after the other."""
    document, end = _header(path)
    tensors = {name: _tensor(name, fields, end, path.name) for name, fields in document.items()}
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != end:
            raise AdapterRejected(f"{path.name} is damaged: {name} does not begin where the tensor before it ends.")
        end = tensor.end
    if end != path.stat().st_size:
        raise AdapterRejected(
            f"{path.name} is damaged: its tensors end at byte {end}, the file at {path.stat().st_size}."
        )
    return tensors


def read_config(path: Path) -> dict[str, Any]:
    """adapter_config.json. Raises AdapterRejected if it is no JSON object of a sane size."""
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise AdapterRejected(f"{path.name} has {path.stat().st_size} bytes, more than {_MAX_CONFIG_BYTES}.")
    return _json_object(path.read_bytes(), path.name)


def linear_shapes(model: Path) -> dict[str, tuple[int, int] | None]:
    """Every module of a model directory that has a weight, with its (outputs, inputs); None where the stored form
    does not tell them. The model is the operator's own: its files are taken as they are."""
    shapes: dict[str, tuple[int, int] | None] = {}
    for path in sorted(model.glob("*.safetensors")):
        document, base = _header(path)
        for name, fields in document.items():
            module, _, kind = name.rpartition(".")
            if name.endswith(_NF4_STATE):
                start, end = fields["data_offsets"]
                shapes[name.removesuffix(_NF4_STATE)] = _nf4_shape(path, base + start, base + end)
            elif kind in _WEIGHT_KINDS and shapes.get(module) is None:
                plain = kind == "weight" and len(fields["shape"]) == 2 and fields["dtype"] in _FLOATS
                shapes[module] = (fields["shape"][0], fields["shape"][1]) if plain else None
    return shapes


def problems(directory: Path, modules: Mapping[str, tuple[int, int] | None]) -> list[str]:
    """What is wrong with an adapter for a base with these modules; empty if nothing is.
    Raises AdapterRejected if it can't even be read."""
    config, tensors = read_config(directory / CONFIG), read_header(directory / WEIGHTS)
    found = [*_config_problems(config), *_tensor_problems(tensors, _ranks(config), modules)]
    return found or [
        f"{name} holds values that are infinite or not a number" for name in _not_finite(directory, tensors)
    ]


def largest_rank(directory: Path) -> int:
    """Of the weights themselves, whatever the configuration says. Raises AdapterRejected if there are none."""
    tensors = read_header(directory / WEIGHTS)
    ranks = [it.shape[0] for name, it in tensors.items() if name.endswith(".lora_A.weight") and it.shape]
    if not ranks:
        raise AdapterRejected(f"{WEIGHTS} holds no LoRA weights (NAME.lora_A.weight).")
    return max(ranks)


def _config_problems(config: dict[str, Any]) -> list[str]:
    found = []
    if config.get("peft_type") != "LORA":
        found.append(f"peft_type is {config.get('peft_type')!r}, not 'LORA'")
    if not _ranks(config):
        found.append("r is not a whole number above 0")
    found += [f"{name} is set, which the engine would ignore" for name in _IGNORED_BY_VLLM if config.get(name)]
    if config.get("use_dora"):
        found.append("it is a DoRA adapter, which the engine can't serve; merge it instead")
    return found


def _ranks(config: dict[str, Any]) -> set[int]:
    """Every rank that the configuration gives some module."""
    pattern = config.get("rank_pattern")
    ranks = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    return {it for it in ranks if type(it) is int and it > 0}


def _tensor_problems(
    tensors: Mapping[str, Tensor], ranks: set[int], modules: Mapping[str, tuple[int, int] | None]
) -> list[str]:
    found, factors = [], {}
    for name, tensor in tensors.items():
        match = _FACTOR.fullmatch(name)
        if match is None or len(tensor.shape) != 2:
            found.append(f"{name} is not a LoRA factor")
        elif tensor.dtype not in _FLOATS:
            found.append(f"{name} is stored as {tensor.dtype}; {', '.join(sorted(_FLOATS))} can be served")
        else:
            factors[match[1], match[2]] = tensor.shape
    for module in sorted({module for module, _ in factors}):
        found += _module_problems(module, factors.get((module, "A")), factors.get((module, "B")), ranks, modules)
    if not tensors:
        found.append(f"{WEIGHTS} is empty")
    return found


def _module_problems(
    module: str,
    a: tuple[int, ...] | None,
    b: tuple[int, ...] | None,
    ranks: set[int],
    modules: Mapping[str, tuple[int, int] | None],
) -> list[str]:
    if a is None or b is None:
        return [f"{module} has one of its two factors only"]
    if a[0] != b[1]:
        return [f"the factors of {module} have different ranks, {a[0]} and {b[1]}"]
    if a[0] not in ranks:
        return [f"{module} has rank {a[0]}, which adapter_config.json does not name: its scale would be wrong"]
    if module not in modules:
        return [f"the base model has no module {module}: the engine would ignore its weights"]
    shape = modules[module]
    if shape and shape != (b[0], a[1]):
        return [f"{module} is {shape[0]} by {shape[1]} in the base model, its factors are for {b[0]} by {a[1]}"]
    return []


def _not_finite(directory: Path, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    import numpy as np

    with (directory / WEIGHTS).open("rb") as stream:
        for name, tensor in tensors.items():
            size, exponent = _FLOATS[tensor.dtype]
            bits = np.dtype(f"<u{size}").type(exponent)
            stream.seek(tensor.start)
            left = tensor.end - tensor.start
            while left:
                piece = np.frombuffer(stream.read(min(left, _SCAN_BYTES)), dtype=f"<u{size}")
                if ((piece & bits) == bits).any():
                    yield name
                    break
                left -= piece.nbytes


def _tensor(name: str, fields: Any, base: int, file: str) -> Tensor:
    try:
        dtype, shape, (start, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        whole = all(type(it) is int and it >= 0 for it in (*shape, start, end))
        if whole and end - start == math.prod(shape) * _SIZES[dtype]:
            return Tensor(dtype, shape, base + start, base + end)
    except (TypeError, KeyError, ValueError):
        pass
    raise AdapterRejected(f"{file} is damaged: the header's entry of {name[:200]} makes no sense.")


def _json_object(content: bytes, file: str) -> dict[str, Any]:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise AdapterRejected(f"{file} is damaged: {error}.") from error
    if not isinstance(document, dict):
        raise AdapterRejected(f"{file} is damaged: expected a JSON object.")
    return document


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file and where the data begin."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise AdapterRejected(f"{path.name} is not a safetensors file: its header would be {length} bytes long.")
        document = _json_object(stream.read(length), path.name)
    document.pop("__metadata__", None)
    return document, 8 + length


def _nf4_shape(path: Path, start: int, end: int) -> tuple[int, int]:
    """The shape of a weight in four bits, as bitsandbytes notes it beside the packed bytes."""
    with path.open("rb") as stream:
        stream.seek(start)
        outputs, inputs = json.loads(stream.read(end - start))["shape"]
    return outputs, inputs
