"""Damaged copies of safetensors files: the file as a whole, the entries of its header, the bytes of its tensors, and
the settings that bitsandbytes keeps in a tensor of each NF4 weight."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.convert.damage import VALUES, Damage, locations, with_value, without, writing

_STATE = "quant_state.bitsandbytes__nf4"
_REMOVED = "removed"


def of_tensors(directory: Path, file: str) -> Iterator[Damage]:
    """Every damage to one tensor of each kind, and to the file."""
    content = (directory / file).read_bytes()
    header, data = _parsed(content)
    for kind, damaged in _whole(content, header, data).items():
        yield Damage(file, kind, None, writing(file, damaged))
    for name in _one_of_each_kind(header):
        entry = header[name]
        for key in entry:
            for kind, text in VALUES.items():
                changed = with_value(header, (name, key), text)
                yield Damage(file, kind, (name, key), writing(file, _joined(changed, data)))
        for kind, other in _other_headers(header, name).items():
            yield Damage(file, kind, (name,), writing(file, _joined(json.dumps(other), data)))
        begin, end = entry["data_offsets"]
        for kind, byte in {"zeros": b"\x00", "all bits set": b"\xff", "huge numbers": b"\x7f"}.items():
            filled = data[:begin] + byte * (end - begin) + data[end:]
            yield Damage(file, kind, (name,), writing(file, _joined(json.dumps(header), filled)))
        if name.endswith(_STATE):
            yield from _of_state(file, header, data, name)


def _of_state(file: str, header: Mapping[str, Any], data: bytes, name: str) -> Iterator[Damage]:
    begin, end = header[name]["data_offsets"]
    state = json.loads(data[begin:end])
    texts = {"no JSON": "{", "a list": "[]", "no text": "\\ud800"}
    for location in locations(state):
        texts |= {
            f"{'.'.join(map(str, location))}: {kind}": with_value(state, location, VALUES[kind]) for kind in VALUES
        }
        texts[f"{'.'.join(map(str, location))}: {_REMOVED}"] = json.dumps(without(state, location))
    for kind, text in texts.items():
        replaced = _with_bytes(header, data, name, text.encode("utf-8", "surrogatepass"))
        yield Damage(file, kind, (name,), writing(file, replaced))


def _whole(content: bytes, header: Mapping[str, Any], data: bytes) -> dict[str, bytes]:
    return {
        "empty": b"",
        "eight bytes": content[:8],
        "half of it": content[: len(content) // 2],
        "one byte less": content[:-1],
        "one byte more": content + b"\x00",
        "a huge header": b"\xff" * 7 + b"\x7f" + content[8:],
        "no header": (0).to_bytes(8, "little") + content[8:],
        "null characters": bytes(len(content)),
        "no tensors": _joined("{}", b""),
        "every tensor twice": _joined(json.dumps(header)[:-1] + "," + json.dumps(header)[1:], data),
        **{f"its header is {kind}": _joined(text, data) for kind, text in VALUES.items()},
    }


def _other_headers(header: Mapping[str, Any], name: str) -> dict[str, dict[str, Any]]:
    entry = header[name]
    flat = [dimension for dimension in entry["shape"] if dimension != 1]
    return {
        _REMOVED: {key: value for key, value in header.items() if key != name},
        "renamed": {(f"{key}x" if key == name else key): value for key, value in header.items()},
        "another type": header | {name: entry | {"dtype": "I16" if entry["dtype"] == "BF16" else "I8"}},
        "transposed": header | {name: entry | {"shape": entry["shape"][::-1]}},
        "with a dimension more": header | {name: entry | {"shape": [1, *entry["shape"]]}},
        "flat": header | {name: entry | {"shape": [int(_product(flat))]}},
    }


def _product(numbers: list[int]) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result


def _one_of_each_kind(header: Mapping[str, Any]) -> list[str]:
    """The first tensor of every kind: names that differ in the layer or module alone are one kind."""
    kinds: dict[str, str] = {}
    for name in header:
        if name != "__metadata__":
            kinds.setdefault(re.sub(r"\d+|\w+_proj", "N", name).replace("mlp", "self_attn"), name)
    return list(kinds.values())


def _with_bytes(header: Mapping[str, Any], data: bytes, name: str, content: bytes) -> bytes:
    """The file with other bytes for a tensor, at its end, and everything else as it was."""
    begin, end = header[name]["data_offsets"]
    moved, rest = {}, data[:begin] + data[end:]
    for key, entry in header.items():
        offsets = entry.get("data_offsets") if key not in (name, "__metadata__") else None
        shift = end - begin if offsets and offsets[0] >= end else 0
        moved[key] = entry | {"data_offsets": [offset - shift for offset in offsets]} if offsets else entry
    offsets = [len(rest), len(rest) + len(content)]
    moved[name] = {"dtype": "U8", "shape": [len(content)], "data_offsets": offsets}
    return _joined(json.dumps(moved), rest + content)


def _parsed(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _joined(header: str, data: bytes) -> bytes:
    encoded = header.encode()
    return len(encoded).to_bytes(8, "little") + encoded + data
