"""Validates the files of an adapter, which are untrusted input: no library parses them before these checks."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import regex

from serve.errors import AdapterRejected

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_FILES = (CONFIG, WEIGHTS)

_MAX_CONFIG_BYTES = 1 << 20
_MAX_HEADER_BYTES = 64 << 20
_SCAN_BYTES = 8 << 20
_LORA_WEIGHT = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight")
_WEIGHT_KINDS = ("weight", "weight_packed", "qweight")
_NF4_STATE = ".weight.quant_state.bitsandbytes__nf4"
# The bytes of one number, and the bits of its exponent: if all of them are set it is infinite or not a number.
_FLOATS = {"F32": (4, 0x7F80_0000), "F16": (2, 0x7C00), "BF16": (2, 0x7F80)}
# Of a value or a scale, and of what they change a weight by, which is far below 10 after training. With these nothing
# gets infinite in float32 or bfloat16: of 16,384 inputs up to 1,000 each an output is below 2e13, and a sum of products
# of two outputs, as an attention score is, below 1e30.
_LARGEST, _LARGEST_CHANGE = 1e4, 1e6
_LARGEST_RANK = 1 << 20  # more than a matrix has
_SIZES = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1,
          "F8_E4M3": 1, "F8_E5M2": 1} | {name: size for name, (size, _) in _FLOATS.items()}  # fmt: skip

# PEFT's settings that vLLM ignores: it would load the adapter and compute something else than PEFT.
_IGNORED_BY_VLLM = (
    "fan_in_fan_out",
    "target_parameters",
    "alora_invocation_tokens",
    "use_qalora",
    "trainable_token_indices",
)

_PATTERNS = ("rank_pattern", "alpha_pattern")
_MATCHING_S = 10.0
_SHORTEST_S = 1e-3  # no time at all would be no limit

# The modules of a base model that have a weight, with their (outputs, inputs); None where these are not known.
ModuleShapes = Mapping[str, tuple[int, int] | None]


@dataclass(frozen=True)
class Tensor:
    """One tensor of a safetensors file; `start` and `end` are bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises AdapterRejected unless they fill the file without a gap, each with as
    many bytes as its shape needs."""
    header, end = _read_header_json(path)
    tensors = {name: _tensor(name, fields, end, path.name) for name, fields in header.items()}
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
    """The content of adapter_config.json. Raises AdapterRejected if it is no JSON object, or too large for one."""
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise AdapterRejected(f"{path.name} has {path.stat().st_size} bytes, more than {_MAX_CONFIG_BYTES}.")
    return _json_object(path.read_bytes(), path.name)


def linear_shapes(model: Path) -> dict[str, tuple[int, int] | None]:
    """The ModuleShapes of a model directory. The model is the operator's own, so its files are trusted."""
    shapes: dict[str, tuple[int, int] | None] = {}
    for path in sorted(model.glob("*.safetensors")):
        header, data_start = _read_header_json(path)
        for name, fields in header.items():
            module, _, kind = name.rpartition(".")
            if name.endswith(_NF4_STATE):
                start, end = fields["data_offsets"]
                shapes[name.removesuffix(_NF4_STATE)] = _nf4_shape(path, data_start + start, data_start + end)
            elif kind in _WEIGHT_KINDS and shapes.get(module) is None:
                shapes[module] = _plain_shape(kind, fields)
    return shapes


def adapter_problems(directory: Path, base_shapes: ModuleShapes) -> list[str]:
    """The reasons why a base model with these modules can't serve the adapter; empty if it can. Raises
    AdapterRejected if the files can't be read."""
    config, tensors = read_config(directory / CONFIG), read_header(directory / WEIGHTS)
    problems = [*_config_problems(config), *_tensor_problems(tensors, _ranks(config), base_shapes)]
    problems = problems or list(_slow_patterns(config, tensors))
    return problems or list(_value_problems(directory, tensors, _largest_scale(config)))


def largest_rank(directory: Path) -> int:
    """The largest rank of the weights, whatever the configuration says. Raises AdapterRejected if there is no LoRA
    weight."""
    tensors = read_header(directory / WEIGHTS)
    ranks = [tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".lora_A.weight") and tensor.shape]
    if not ranks:
        raise AdapterRejected(f"{WEIGHTS} holds no LoRA weights (NAME.lora_A.weight).")
    return max(ranks)


def _config_problems(config: dict[str, Any]) -> list[str]:
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type is {config.get('peft_type')!r}, not 'LORA'")
    if not _ranks(config):
        problems.append(f"r is not a whole number from 1 to {_LARGEST_RANK}")
    elif _largest_scale(config) > _LARGEST:
        problems.append(f"lora_alpha or alpha_pattern is not a number, or so large that the scale is over {_LARGEST:g}")
    problems += [f"{name} is set, which the engine would ignore" for name in _IGNORED_BY_VLLM if config.get(name)]
    if config.get("use_dora"):
        problems.append("it is a DoRA adapter, which the engine can't serve; merge it instead")
    return problems


def _slow_patterns(config: dict[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """The first pattern with which matching takes too long: the engine matches each against every module, with this
    same library and no limit, while all callers wait. Those of a large model take a second."""
    modules = {match[1] for name in tensors if (match := _LORA_WEIGHT.fullmatch(name))}
    until_s = time.monotonic() + _MATCHING_S
    for setting in _PATTERNS:
        patterns = config.get(setting)
        for pattern in patterns if isinstance(patterns, dict) else ():
            try:
                compiled = regex.compile(rf"(.*\.)?({pattern})$")
                for module in modules:
                    compiled.match(module, timeout=max(until_s - time.monotonic(), _SHORTEST_S), concurrent=True)
            except TimeoutError:
                yield f"{setting} takes more than {_MATCHING_S:g} s to match, at the pattern {pattern[:60]!r}"
                return
            except regex.error as error:
                yield f"{setting} holds the pattern {pattern[:60]!r}, which is none ({error})"


def _ranks(config: dict[str, Any]) -> set[int]:
    """All ranks that the configuration gives to a module."""
    pattern = config.get("rank_pattern")
    ranks = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    return {rank for rank in ranks if type(rank) is int and 0 < rank <= _LARGEST_RANK}


def _tensor_problems(tensors: Mapping[str, Tensor], ranks: set[int], base_shapes: ModuleShapes) -> list[str]:
    problems = [] if tensors else [f"{WEIGHTS} is empty"]
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}  # module → "A" or "B" → shape
    for name, tensor in tensors.items():
        match = _LORA_WEIGHT.fullmatch(name)
        if match is None or len(tensor.shape) != 2:
            problems.append(f"{name} is not a LoRA factor")
        elif tensor.dtype not in _FLOATS:
            problems.append(f"{name} is stored as {tensor.dtype}; {', '.join(sorted(_FLOATS))} can be served")
        else:
            shapes.setdefault(match[1], {})[match[2]] = tensor.shape
    of_modules = (
        _module_problem(module, shapes[module].get("A"), shapes[module].get("B"), ranks, base_shapes)
        for module in sorted(shapes)
    )
    return [*problems, *filter(None, of_modules)]


def _module_problem(
    module: str,
    a: tuple[int, ...] | None,
    b: tuple[int, ...] | None,
    ranks: set[int],
    base_shapes: ModuleShapes,
) -> str | None:
    """`a` is the shape of lora_A, (rank, inputs), and `b` that of lora_B, (outputs, rank)."""
    if a is None or b is None:
        return f"{module} has one of its two factors only"
    if a[0] != b[1]:
        return f"the factors of {module} have different ranks, {a[0]} and {b[1]}"
    if a[0] not in ranks:
        return f"{module} has rank {a[0]}, which adapter_config.json does not name: its scale would be wrong"
    if module not in base_shapes:
        return f"the base model has no module {module}: the engine would ignore its weights"
    shape = base_shapes[module]
    if shape and shape != (b[0], a[1]):
        return f"{module} is {shape[0]} by {shape[1]} in the base model, its factors are for {b[0]} by {a[1]}"
    return None


def _largest_scale(config: dict[str, Any]) -> float:
    """An upper bound of the factor before B A, in any module; infinite where an alpha is too large, or no number."""
    pattern = config.get("alpha_pattern")
    alphas = [config.get("lora_alpha"), *(pattern.values() if isinstance(pattern, dict) else ())]
    if not all(type(alpha) in (int, float) and abs(alpha) <= _LARGEST * _LARGEST_RANK for alpha in alphas):
        return math.inf
    rank = min(_ranks(config))
    largest: float = max(map(abs, alphas))
    return largest / (rank**0.5 if config.get("use_rslora") else rank)


def _value_problems(directory: Path, tensors: Mapping[str, Tensor], scale: float) -> Iterator[str]:
    """Values that are no numbers, or that would make some in the engine: it keeps what it has computed, for a while, in
    memory that requests of other models get next."""
    largest = {"A": 0.0, "B": 0.0}
    with (directory / WEIGHTS).open("rb") as stream:
        for name, tensor in tensors.items():
            magnitude = _largest_magnitude(stream, tensor)
            if magnitude == math.inf:
                yield f"{name} holds values that are infinite or not a number"
            elif magnitude > _LARGEST:
                yield f"{name} holds the value {magnitude:g}, over {_LARGEST:g}: the engine would get infinite ones"
            elif match := _LORA_WEIGHT.fullmatch(name):
                largest[match[2]] = max(largest[match[2]], magnitude)
    rank = max(tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name)
    change = scale * rank * largest["A"] * largest["B"]
    if change > _LARGEST_CHANGE:
        yield f"it may change a weight by {change:.2g}, over {_LARGEST_CHANGE:g}: the engine would get infinite values"


def _largest_magnitude(stream: BinaryIO, tensor: Tensor) -> float:
    """Infinite if a value is, or is no number. Reads the tensor in pieces, so that memory stays bounded."""
    import numpy as np

    size, exponent = _FLOATS[tensor.dtype]
    without_sign, largest = np.dtype(f"<u{size}").type(2 ** (8 * size - 1) - 1), 0
    stream.seek(tensor.start)
    remaining = tensor.end - tensor.start
    while remaining:
        piece = np.frombuffer(stream.read(min(remaining, _SCAN_BYTES)), dtype=f"<u{size}")
        # Without the sign, bits of floating-point numbers are in the order of the numbers.
        largest = max(largest, int((piece & without_sign).max()))
        remaining -= piece.nbytes
    if largest >= exponent:
        return math.inf
    if tensor.dtype == "F16":
        return float(np.array(largest, "<u2").view("<f2"))
    bits = largest << 16 if tensor.dtype == "BF16" else largest  # a BF16 is the upper half of an F32
    return float(np.array(bits, "<u4").view("<f4"))


def _tensor(name: str, fields: Any, data_start: int, file: str) -> Tensor:
    """One entry of a header. Raises AdapterRejected."""
    try:
        dtype, shape, (start, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        are_counts = all(type(number) is int and number >= 0 for number in (*shape, start, end))
        if are_counts and end - start == math.prod(shape) * _SIZES[dtype]:
            return Tensor(dtype, shape, data_start + start, data_start + end)
    except (TypeError, KeyError, ValueError):
        pass
    raise AdapterRejected(f"{file} is damaged: the header's entry of {name[:200]} makes no sense.")


def _json_object(content: bytes, file: str) -> dict[str, Any]:
    try:
        document = json.loads(content)
        json.dumps(document, ensure_ascii=False).encode()  # half a surrogate pair is in no text that can be sent on
    except (ValueError, RecursionError) as error:
        raise AdapterRejected(f"{file} is damaged: {error}.") from error
    if not isinstance(document, dict):
        raise AdapterRejected(f"{file} is damaged: expected a JSON object.")
    return document


def _read_header_json(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file without its metadata, and the byte at which the tensors start."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise AdapterRejected(f"{path.name} is not a safetensors file: its header would be {length} bytes long.")
        document = _json_object(stream.read(length), path.name)
    document.pop("__metadata__", None)
    return document, 8 + length


def _plain_shape(kind: str, fields: Mapping[str, Any]) -> tuple[int, int] | None:
    """The shape of a weight that is stored as floating-point numbers; None for any other."""
    if kind != "weight" or fields["dtype"] not in _FLOATS or len(fields["shape"]) != 2:
        return None
    return fields["shape"][0], fields["shape"][1]


def _nf4_shape(path: Path, start: int, end: int) -> tuple[int, int]:
    """The shape of a 4-bit weight, from the quantization state that bitsandbytes stores beside the packed bytes."""
    with path.open("rb") as stream:
        stream.seek(start)
        outputs, inputs = json.loads(stream.read(end - start))["shape"]
    return outputs, inputs
