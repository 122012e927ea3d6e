from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from convert.artifact.json_files import read_json
from convert.errors import CheckpointUnreadable, ConvertError
from convert.safetensors_io.tensors import Tensors

SAMPLE = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "c": torch.empty(0, dtype=torch.int64),
}


def opened(directory: Path) -> Tensors:
    return Tensors.open(directory, "model", CheckpointUnreadable)


def write_raw(directory: Path, header: object, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_tensors_read_as_they_were_saved(tmp_path: Path) -> None:
    save_file(SAMPLE, tmp_path / "model.safetensors")

    tensors = opened(tmp_path)

    assert {name: (spec.dtype, spec.shape) for name, spec in tensors.specs.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("BF16", (2,)),
        "c": ("I64", (0,)),
    }
    for name, expected in SAMPLE.items():
        assert torch.equal(tensors.read(name), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_of_a_matrix_read_as_they_were_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    matrix = torch.randn(7, 3).to(dtype)
    save_file({"a": torch.ones(5), "matrix": matrix, "z": torch.ones(2)}, tmp_path / "model.safetensors")

    tensors = Tensors.open(tmp_path, "model", CheckpointUnreadable)

    assert torch.equal(tensors.read_rows("matrix", 0, 7), matrix)
    assert torch.equal(tensors.read_rows("matrix", 2, 3), matrix[2:3])
    assert torch.equal(tensors.read_rows("matrix", 4, 7), matrix[4:])


def test_an_index_spans_files(tmp_path: Path) -> None:
    save_file({"a": SAMPLE["a"]}, tmp_path / "one.safetensors")
    save_file({"b": SAMPLE["b"]}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))

    assert torch.equal(opened(tmp_path).read("b"), SAMPLE["b"])


@pytest.mark.parametrize(
    "file",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "sub/one.safetensors",
        "..\\one.safetensors",
        "x\0.safetensors",
        3,
        None,
        "",
    ],
    ids=["parent", "absolute", "subfolder", "backslash", "nul", "number", "null", "empty"],
)
def test_an_index_may_not_leave_its_directory(tmp_path: Path, file: object) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    save_file({"a": SAMPLE["a"]}, tmp_path / "outside.safetensors")
    (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))

    with pytest.raises(CheckpointUnreadable, match=r"only \.safetensors files beside the index"):
        opened(inside)


def test_an_index_that_names_what_is_not_there_is_refused(tmp_path: Path) -> None:
    save_file({"a": SAMPLE["a"]}, tmp_path / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(CheckpointUnreadable, match="'b'"):
        opened(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "one.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(CheckpointUnreadable, match=r"one\.safetensors is missing"):
        opened(tmp_path)


def test_pickled_weights_are_not_opened_and_the_error_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"\x80\x04not a pickle that anyone should load")

    with pytest.raises(CheckpointUnreadable, match=r"pickle.*save_file"):
        opened(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 8, 40, -1], ids=lambda keep: f"{keep} bytes")
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    (tmp_path / "model.safetensors").write_bytes(save(SAMPLE)[:keep])

    with pytest.raises(CheckpointUnreadable, match="not a whole safetensors file"):
        opened(tmp_path)


def entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a": ' + b"9" * 10_000 + b"}",
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        {"a": 3},
        {"a": entry(dtype="F33")},
        {"a": entry(dtype=["F32"])},
        {"a": entry(shape=[-1])},
        {"a": entry(shape=[True])},
        {"a": entry(shape=[1.0])},
        {"a": entry(shape=[1 << 70])},
        {"a": entry(shape=[1] * 40)},
        {"a": entry(shape=None)},
        {"a": entry(data_offsets=[0])},
        {"a": entry(data_offsets=[4, 0])},
        {"a": entry(data_offsets=[4, 8])},
        {"a": entry(data_offsets=[0, 8])},
        {"a": entry(), "b": entry()},
        {},
        {"\ud800": entry(shape=[2])},
    ],
    ids=lambda header: str(header)[:30],
)
def test_a_hostile_header_is_refused(tmp_path: Path, header: object) -> None:
    write_raw(tmp_path, header, b"\0\0\0\0")

    with pytest.raises(CheckpointUnreadable, match="not a whole safetensors file") as caught:
        opened(tmp_path)
    str(caught.value).encode()


def test_a_header_longer_than_the_file_is_not_allocated(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")

    with pytest.raises(CheckpointUnreadable, match="does not fit"):
        opened(tmp_path)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["F32", "BF16", "U8"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["a", "dtype", "shape", "data_offsets"]), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=JSON, data=st.binary(max_size=16))
def test_any_header_gives_tensors_or_an_error_for_the_user(tmp_path: Path, header: object, data: bytes) -> None:
    write_raw(tmp_path, json.dumps(header).encode(), data)
    read_all_or_be_told(tmp_path)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 300), replacement=st.binary(min_size=1, max_size=9))
def test_any_damage_to_a_file_gives_tensors_or_an_error_for_the_user(
    tmp_path: Path, position: int, replacement: bytes
) -> None:
    content = bytearray(save(SAMPLE))
    content[position : position + len(replacement)] = replacement
    (tmp_path / "model.safetensors").write_bytes(content)
    read_all_or_be_told(tmp_path)


FILES = st.sampled_from(
    ["one.safetensors", "two.safetensors", "../one.safetensors", "/etc/passwd", "one.bin", "", "\0"]
)
INDEX = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6) | FILES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["weight_map", "metadata", "a", "b"]), inner)
    ),
    max_leaves=8,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(index=INDEX | st.builds(lambda entries: {"weight_map": entries}, st.dictionaries(st.sampled_from("abc"), FILES)))
def test_any_index_gives_tensors_of_its_directory_or_an_error_for_the_user(tmp_path: Path, index: object) -> None:
    inside = tmp_path / "inside"
    inside.mkdir(exist_ok=True)
    for place in (tmp_path, inside):
        save_file({"a": SAMPLE["a"]}, place / "one.safetensors")
    (inside / "model.safetensors.index.json").write_text(json.dumps(index))

    read_all_or_be_told(inside)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60))
def test_any_bytes_as_an_index_are_reported(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(content)

    with pytest.raises(ConvertError):
        opened(tmp_path)


def read_all_or_be_told(directory: Path) -> None:
    try:
        tensors = opened(directory)
    except ConvertError:
        return
    assert {path.parent for path in tensors.files} <= {directory}
    for name, spec in tensors.specs.items():
        assert tuple(tensors.read(name).shape) == spec.shape


def test_json_must_be_text_that_can_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(r'{"name": "\ud83d\ude00"}')
    assert read_json(path, CheckpointUnreadable) == {"name": "\U0001f600"}

    path.write_text(r'{"name": "\ud83d"}')
    with pytest.raises(CheckpointUnreadable, match=r"config\.json is not readable JSON"):
        read_json(path, CheckpointUnreadable)
