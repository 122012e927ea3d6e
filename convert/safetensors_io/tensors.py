"""Tensors of a directory's safetensors files, known by name, type and shape without reading them.

A safetensors file is an 8-byte little-endian length, a JSON header of that length and the data:
https://github.com/huggingface/safetensors#format. Headers are checked as hostile input; pickled weights
(.bin, .pt) are never opened, since loading them runs code.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.errors import ConvertError

if TYPE_CHECKING:
    import torch

# Type in the header -> bytes of an element, name of the type in torch.
DTYPES: Mapping[str, tuple[int, str]] = {
    "F64": (8, "float64"),
    "F32": (4, "float32"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
    "I64": (8, "int64"),
    "I32": (4, "int32"),
    "I16": (2, "int16"),
    "I8": (1, "int8"),
    "U8": (1, "uint8"),
    "BOOL": (1, "bool"),
}
FLOATS = ("F32", "F16", "BF16")

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_MAX_DIMENSIONS = 16
_READ_BYTES = 8 << 20
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class _Malformed(Exception):
    """What is wrong with a file, before it is known whose file it is."""


@dataclass(frozen=True)
class TensorSpec:
    """What a header says of a tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][0]


@dataclass(frozen=True)
class _Place:
    path: Path
    offset: int


@dataclass(frozen=True)
class Tensors:
    """Tensors of one directory, over one file or many. Nothing stays open or in memory between reads."""

    directory: Path
    specs: Mapping[str, TensorSpec]
    files: tuple[Path, ...]
    _places: Mapping[str, _Place]
    _error: type[ConvertError]

    @classmethod
    def open(cls, directory: Path, stem: str, error: type[ConvertError]) -> Tensors:
        """Read the headers of `stem`.safetensors, or of the files that `stem`.safetensors.index.json names.

        Raises `error` where a file is missing, malformed, truncated or outside the directory.
        """
        specs: dict[str, TensorSpec] = {}
        places: dict[str, _Place] = {}
        weight_map, files = _weight_map(directory, stem, error)
        for path in files:
            for spec, offset in _header(path, error):
                if spec.name in specs:
                    raise error(f"{path} holds {spec.name!r} a second time: {places[spec.name].path.name} has it too")
                specs[spec.name], places[spec.name] = spec, _Place(path, offset)
        if lost := sorted(name for name, path in weight_map.items() if name not in specs or places[name].path != path):
            raise error(
                f"{directory / stem}.safetensors.index.json names {len(lost)} tensors that are not in their files "
                f"({', '.join(map(repr, lost[:3]))}{', …' if len(lost) > 3 else ''}). Copy the directory again, whole."
            )
        return cls(directory, specs, files, places, error)

    def __contains__(self, name: str) -> bool:
        return name in self.specs

    def place(self, name: str) -> tuple[Path, int]:
        """The file a tensor is in, and the offset of its first byte there."""
        place = self._places[name]
        return place.path, place.offset

    def data_begin(self, path: Path) -> int:
        """Where the header of one of the files ends."""
        return min((place.offset for place in self._places.values() if place.path == path), default=0)

    def shorter(self, path: Path, name: str) -> ConvertError:
        """The error to raise where a file ends before a tensor does, though its header was fine."""
        return self._error(f"{path} became shorter while {name!r} was read from it")

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in memory of its own, with the type and shape of its spec."""
        import torch

        spec = self.specs[name]
        buffer, position = bytearray(spec.nbytes), 0
        for piece in self.chunks(name):
            buffer[position : position + len(piece)] = piece
            position += len(piece)
        dtype = getattr(torch, DTYPES[spec.dtype][1])
        if not buffer:
            return torch.empty(spec.shape, dtype=dtype)
        return torch.frombuffer(buffer, dtype=dtype).reshape(spec.shape)

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of a tensor as they are in the file, in pieces of 8 MiB."""
        spec, place = self.specs[name], self._places[name]
        left = spec.nbytes
        with place.path.open("rb") as stream:
            stream.seek(place.offset)
            while left:
                piece = stream.read(min(left, _READ_BYTES))
                if not piece:
                    raise self.shorter(place.path, name)
                left -= len(piece)
                yield piece


def all_finite(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether every element is finite, also after rounding to `dtype`.

    The extremes tell: rounding keeps the order, and a NaN anywhere makes both of them NaN.
    """
    import torch

    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    lowest, highest = (float(it) for it in torch.aminmax(tensor))
    largest = torch.finfo(dtype or tensor.dtype).max
    if -largest <= lowest and highest <= largest:
        return True
    return bool(torch.tensor([lowest, highest], dtype=tensor.dtype).to(dtype or tensor.dtype).isfinite().all())


def read_json(path: Path, error: type[ConvertError]) -> dict[str, Any]:
    """The JSON object in a file; raises `error` naming the file when there is none."""
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise error(f"{path} is missing") from None
    # RecursionError: thousands of nested brackets.
    except (OSError, ValueError, RecursionError) as cause:
        raise error(f"{path} is not readable JSON: {cause}") from None
    if not isinstance(document, dict):
        raise error(f"{path} must hold a JSON object, not a {type(document).__name__}")
    return document


def _weight_map(directory: Path, stem: str, error: type[ConvertError]) -> tuple[dict[str, Path], tuple[Path, ...]]:
    single, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    if single.is_file():
        return {}, (single,)
    if not index.is_file():
        raise error(_nothing_there(directory, single.name))
    entries = read_json(index, error).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise error(f"{index} has no weight_map")
    weight_map = {name: _member(index, file, error) for name, file in entries.items()}
    return weight_map, tuple(sorted(set(weight_map.values())))


def _member(index: Path, file: object, error: type[ConvertError]) -> Path:
    if not isinstance(file, str) or not file.endswith(".safetensors") or "/" in file or "\\" in file or "\0" in file:
        raise error(f"{index} names the file {file!r}; only .safetensors files beside the index are read")
    return index.parent / file


def _nothing_there(directory: Path, expected: str) -> str:
    pickled = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    pickled = [name for name in pickled if name.startswith(("adapter_model", "pytorch_model", "model", "consolidated"))]
    if not pickled:
        return f"{directory} has no {expected}: give a directory that is whole, or copy it again."
    save = f"save_file(torch.load('{pickled[0]}', weights_only=True), '{expected}')"
    return (
        f"{directory} holds its weights as {pickled[0]}: a pickle, which runs code when it is loaded and is never "
        f"opened here. If you trust its origin, save it as safetensors in that directory first: "
        f'python -c "import torch; from safetensors.torch import save_file; {save}"'
    )


def _header(path: Path, error: type[ConvertError]) -> list[tuple[TensorSpec, int]]:
    """Every tensor of a file with the offset of its first byte."""
    try:
        return _parse(path)
    except FileNotFoundError:
        raise error(f"{path} is missing. Copy the directory again, whole.") from None
    except (_Malformed, OSError) as cause:
        raise error(f"{path} is not a whole safetensors file: {cause}. Copy or save it again.") from None


def _parse(path: Path) -> list[tuple[TensorSpec, int]]:
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(_MAX_HEADER_BYTES, size - 8):
            raise _Malformed(f"its header does not fit into its {size} bytes")
        header = _document(stream.read(length))
    data = 8 + length
    entries = [_entry(name, entry) for name, entry in header.items() if name != "__metadata__"]
    _check_layout(entries, size - data)
    return [(spec, data + begin) for spec, begin in entries]


def _document(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as cause:
        raise _Malformed(f"its header is not JSON ({cause})") from None
    if not isinstance(header, dict):
        raise _Malformed("its header is not a JSON object")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise _Malformed("its header holds a name twice")
    return names


def _entry(name: str, entry: Any) -> tuple[TensorSpec, int]:
    if not isinstance(entry, dict) or entry.get("dtype") not in list(DTYPES):
        raise _Malformed(f"{name!r} has no known dtype")
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if shape is None or not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise _Malformed(f"{name!r} has no valid shape")
    if offsets is None or not _are_sizes(offsets) or len(offsets) != 2:
        raise _Malformed(f"{name!r} has no valid data_offsets")
    spec = TensorSpec(name, entry["dtype"], tuple(shape))
    if offsets[1] - offsets[0] != spec.nbytes:
        raise _Malformed(f"{name!r} has {offsets[1] - offsets[0]} bytes where its shape needs {spec.nbytes}")
    return spec, offsets[0]


def _are_sizes(value: Any) -> bool:
    # type(), since JSON's true is an int to isinstance
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _check_layout(entries: list[tuple[TensorSpec, int]], data_bytes: int) -> None:
    """The format allows neither holes nor overlaps: together the tensors are exactly the data."""
    position = 0
    for spec, begin in sorted(entries, key=lambda entry: (entry[1], entry[0].nbytes)):
        if begin != position:
            raise _Malformed(f"{spec.name!r} begins at {begin}, not where the tensor before it ends ({position})")
        position += spec.nbytes
    if position != data_bytes:
        raise _Malformed(f"its tensors need {position} bytes, it holds {data_bytes}")
