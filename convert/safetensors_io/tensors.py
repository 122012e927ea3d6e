"""The tensors of a directory's safetensors files: names, types and shapes from the headers, values on request.

A safetensors file is an 8-byte little-endian length, a JSON header of that length and the data:
https://github.com/huggingface/safetensors#format. Headers are checked as hostile input. Pickled weights (.bin, .pt) are
never opened, since loading them runs code.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.artifact.foreign_files import foreign_format, missing_weights
from convert.artifact.json_files import read_json, require_text, shown
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
# A name is matched against many patterns, in a time that grows faster than its length. Those of models have below 100.
_MAX_NAME_CHARACTERS = 500
# As in a manifest, which names every file of a model.
_FILE_NAME = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)
_READ_BYTES = 8 << 20


class _Malformed(Exception):
    """A file is malformed; the message says how. The caller raises the error class of the input it belongs to."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, type and shape of a tensor, as in a header."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][0]


@dataclass(frozen=True)
class _Location:
    path: Path
    offset: int


@dataclass(frozen=True)
class Tensors:
    """The tensors of one directory, in one or more files. Nothing stays open or in memory between reads."""

    directory: Path
    specs: Mapping[str, TensorSpec]
    files: tuple[Path, ...]
    _locations: Mapping[str, _Location]
    _error: type[ConvertError]

    @classmethod
    def open(cls, directory: Path, stem: str, error: type[ConvertError]) -> Tensors:
        """Read the headers of `stem`.safetensors, or of the files that `stem`.safetensors.index.json names.

        Raises `error` where a file is missing, malformed, truncated or outside the directory.
        """
        specs: dict[str, TensorSpec] = {}
        locations: dict[str, _Location] = {}
        weight_map, files = _weight_map(directory, stem, error)
        for path in files:
            for spec, offset in _header(path, error):
                if first := locations.get(spec.name):
                    raise error(f"{path} holds {spec.name!r} a second time: {first.path.name} has it too")
                specs[spec.name], locations[spec.name] = spec, _Location(path, offset)
        tensors = cls(directory, specs, files, locations, error)
        if missing := sorted(name for name, path in weight_map.items() if not tensors._is_in(name, path)):
            listed = ", ".join(map(repr, missing[:3])) + (", …" if len(missing) > 3 else "")
            raise error(
                f"{directory / stem}.safetensors.index.json names {len(missing)} tensors that are not in their files "
                f"({listed}). Copy the directory again, whole."
            )
        return tensors

    def __contains__(self, name: str) -> bool:
        return name in self.specs

    def renamed(self, names: Mapping[str, str]) -> Tensors:
        """The same tensors with other names. `names`: the new name of each tensor that gets one, by its present one.

        Raises the error of `open` where two would have one name.
        """
        specs: dict[str, TensorSpec] = {}
        for name, spec in self.specs.items():
            new = names.get(name, name)
            if new in specs:
                raise self._error(f"{self.directory} holds {new!r} a second time, under another name")
            specs[new] = replace(spec, name=new)
        locations = {names.get(name, name): location for name, location in self._locations.items()}
        return replace(self, specs=specs, _locations=locations)

    def location(self, name: str) -> tuple[Path, int]:
        """The file a tensor is in, and the offset of its first byte there."""
        location = self._locations[name]
        return location.path, location.offset

    def header_bytes(self, path: Path) -> int:
        """The length of a file's header, after which its tensors begin."""
        return min((location.offset for location in self._locations.values() if location.path == path), default=0)

    def truncated(self, path: Path, name: str) -> ConvertError:
        """The error to raise where a file has become shorter since its header was read."""
        return self._error(f"{path} became shorter while {name!r} was read from it")

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in memory of its own, with the type and shape of its spec."""
        spec = self.specs[name]
        return self._values(spec, self.chunks(name))

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a matrix, as `read` would give them."""
        spec = self.specs[name]
        before, rows = (replace(spec, shape=(count, *spec.shape[1:])) for count in (start, stop - start))
        return self._values(rows, self._chunks(name, before.nbytes, rows.nbytes))

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of a tensor as they are in the file, in pieces of 8 MiB."""
        return self._chunks(name, 0, self.specs[name].nbytes)

    def _values(self, spec: TensorSpec, pieces: Iterator[bytes]) -> torch.Tensor:
        import torch

        buffer, position = bytearray(spec.nbytes), 0
        for piece in pieces:
            buffer[position : position + len(piece)] = piece
            position += len(piece)
        dtype = getattr(torch, DTYPES[spec.dtype][1])
        if not buffer:
            return torch.empty(spec.shape, dtype=dtype)
        return torch.frombuffer(buffer, dtype=dtype).reshape(spec.shape)

    def _chunks(self, name: str, start: int, left: int) -> Iterator[bytes]:
        location = self._locations[name]
        with location.path.open("rb") as stream:
            stream.seek(location.offset + start)
            while left:
                piece = stream.read(min(left, _READ_BYTES))
                if not piece:
                    raise self.truncated(location.path, name)
                left -= len(piece)
                yield piece

    def has_bytes_of(self, name: str, other: Tensors, other_name: str) -> bool:
        """Whether a tensor has the type, the shape and the bytes of another one."""
        first, second = self.specs[name], other.specs[other_name]
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            return False
        return all(left == right for left, right in zip(self.chunks(name), other.chunks(other_name), strict=True))

    def _is_in(self, name: str, path: Path) -> bool:
        return name in self._locations and self._locations[name].path == path


def all_finite(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether every element is finite, also after rounding to `dtype`.

    Only the extremes are checked: rounding keeps the order of numbers, and one NaN makes both extremes NaN.
    """
    import torch

    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    lowest, highest = map(float, torch.aminmax(tensor))
    largest = torch.finfo(dtype or tensor.dtype).max
    if -largest <= lowest and highest <= largest:
        return True
    return bool(torch.tensor([lowest, highest], dtype=tensor.dtype).to(dtype or tensor.dtype).isfinite().all())


def _weight_map(directory: Path, stem: str, error: type[ConvertError]) -> tuple[dict[str, Path], tuple[Path, ...]]:
    single, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    if single.is_file():
        return {}, (single,)
    if not index.is_file():
        raise error(missing_weights(directory, single.name))
    entries = read_json(index, error).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise error(f"{index} has no weight_map")
    weight_map = {name: _member(index, file, error) for name, file in entries.items()}
    return weight_map, tuple(sorted(set(weight_map.values())))


def _member(index: Path, file: object, error: type[ConvertError]) -> Path:
    if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
        raise error(
            f"{index}: weight_map names the file {shown(file)}; only .safetensors files beside the index are read, "
            "with names of ASCII letters, digits, '_', '-' and '.'"
        )
    return index.parent / file


def _header(path: Path, error: type[ConvertError]) -> list[tuple[TensorSpec, int]]:
    """Every tensor of a file, with the offset of its first byte in the file."""
    try:
        return _parse(path)
    except FileNotFoundError:
        raise error(f"{path} is missing. Copy the directory again, whole.") from None
    except (_Malformed, OSError) as cause:
        broken = f"is not a whole safetensors file: {cause}. Copy or save it again"
        raise error(f"{path} {foreign_format(path) or broken}.") from None


def _parse(path: Path) -> list[tuple[TensorSpec, int]]:
    if path.exists() and not path.is_file():
        raise _Malformed("it is a directory or a device")
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
        if b"\\u" in text:
            require_text(header)
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
    if len(name) > _MAX_NAME_CHARACTERS:
        raise _Malformed(f"a name has {len(name)} characters, more than {_MAX_NAME_CHARACTERS}: {shown(name)}")
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
    """Requires that the tensors fill the data without gaps or overlaps, as the format demands."""
    position = 0
    for spec, begin in sorted(entries, key=lambda entry: (entry[1], entry[0].nbytes)):
        if begin != position:
            raise _Malformed(f"{spec.name!r} begins at {begin}, not where the tensor before it ends ({position})")
        position += spec.nbytes
    if position != data_bytes:
        raise _Malformed(f"its tensors need {position} bytes, it holds {data_bytes}")
