from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from serve.adapters import file_validation
from serve.adapters.file_validation import CONFIG, WEIGHTS, adapter_problems, largest_rank, linear_shapes, read_header
from serve.errors import AdapterRejected
from tests.serve.conftest import MODULE, write_adapter, write_base, write_weights

A, B = (f"base_model.model.{MODULE}.lora_{factor}.weight" for factor in "AB")
SHAPES = {MODULE: (6, 4)}

Tensors = dict[str, Any]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", "pirate")


def change(adapter: Path, edit: Callable[[Tensors], Tensors]) -> None:
    write_weights(adapter, edit(load_file(adapter / WEIGHTS)))


def test_a_sound_adapter_has_no_problems(adapter: Path, tmp_path: Path) -> None:
    write_base(tmp_path / "base", "base")

    assert linear_shapes(tmp_path / "base") == SHAPES
    assert adapter_problems(adapter, SHAPES) == []
    assert largest_rank(adapter) == 2


def test_the_header_is_read_as_the_library_reads_it(adapter: Path) -> None:
    header = read_header(adapter / WEIGHTS)

    with safe_open(adapter / WEIGHTS, "np") as file:
        assert {name: list(tensor.shape) for name, tensor in header.items()} == {
            name: file.get_slice(name).get_shape()
            for name in file.keys()  # noqa: SIM118  (it is no mapping)
        }


def test_the_shape_of_a_four_bit_weight_is_read_from_its_quantization_state(tmp_path: Path) -> None:
    from tests.convert import parts

    parts.save_quantized(parts.save_base(tmp_path / "base", tied=True), tmp_path / "nf4")

    assert linear_shapes(tmp_path / "nf4")["model.layers.1.mlp.down_proj"] == (64, 128)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_a_value_that_is_not_finite_is_found(adapter: Path, value: float, kind: type) -> None:
    def spoil(tensors: Tensors) -> Tensors:
        tensors = {name: tensor.astype(kind) for name, tensor in tensors.items()}
        tensors[B][5, 1] = value
        return tensors

    change(adapter, spoil)

    assert adapter_problems(adapter, SHAPES) == [f"{B} holds values that are infinite or not a number"]


@pytest.mark.parametrize("bits", [0x7F80, 0x7FC0, 0xFF80])
def test_a_value_that_is_not_finite_is_found_in_bfloat16(adapter: Path, bits: int) -> None:
    import torch
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file as save

    tensors = {name: tensor.bfloat16() for name, tensor in load(adapter / WEIGHTS).items()}
    save(tensors, adapter / WEIGHTS)
    assert adapter_problems(adapter, SHAPES) == []
    tensors[A].view(torch.int16)[0, 0] = bits - (1 << 16 if bits >= 1 << 15 else 0)
    save(tensors, adapter / WEIGHTS)

    assert "not a number" in adapter_problems(adapter, SHAPES)[0]


@pytest.mark.parametrize("stored_as", ["float32", "float16", "bfloat16"])
def test_a_value_that_would_overflow_in_the_engine_is_found(adapter: Path, stored_as: str) -> None:
    import torch
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file as save

    tensors = {name: tensor.to(getattr(torch, stored_as)) for name, tensor in load(adapter / WEIGHTS).items()}
    tensors[A][1, 3] = -9984
    save(tensors, adapter / WEIGHTS)
    assert adapter_problems(adapter, SHAPES) == []
    tensors[A][1, 3] = -10048
    save(tensors, adapter / WEIGHTS)

    (problem,) = adapter_problems(adapter, SHAPES)

    assert problem == f"{A} holds the value 10048, over 10000: the engine would get infinite ones"


def test_factors_that_overflow_together_are_found(adapter: Path) -> None:
    change(adapter, lambda tensors: {name: np.full_like(tensor, 2000) for name, tensor in tensors.items()})

    (problem,) = adapter_problems(adapter, SHAPES)

    assert problem.startswith("it may change a weight by 8e+06, over 1e+06")  # scale 1, rank 2


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        pytest.param(lambda tensors: {A: tensors[A]}, "one of its two factors", id="half"),
        pytest.param(
            lambda tensors: tensors | {A: tensors[A][:1].copy()}, "different ranks, 1 and 2", id="ranks-differ"
        ),
        pytest.param(
            lambda tensors: {A: np.zeros((3, 4), "f4"), B: np.zeros((6, 3), "f4")}, "rank 3", id="rank-unnamed"
        ),
        pytest.param(lambda tensors: tensors | {A: np.zeros((2, 5), "f4")}, "6 by 4 in the base model", id="shape"),
        pytest.param(lambda tensors: tensors | {A: tensors[A].astype("f8")}, "stored as F64", id="dtype"),
        pytest.param(lambda tensors: tensors | {"lm_head.weight": tensors[A]}, "not a LoRA factor", id="plain-weight"),
        pytest.param(
            lambda tensors: {name.replace("layers.0", "layers.9"): x for name, x in tensors.items()},
            "no module",
            id="layer",
        ),
        pytest.param(
            lambda tensors: {name.replace("model.layers", "model.model.layers"): x for name, x in tensors.items()},
            "the engine would ignore its weights",
            id="prefix",
        ),
        pytest.param(lambda tensors: {}, "is empty", id="empty"),
    ],
)
def test_weights_that_would_be_ignored_or_scaled_wrong_are_found(
    adapter: Path, edit: Callable[[Tensors], Tensors], problem: str
) -> None:
    change(adapter, edit)

    assert any(problem in message for message in adapter_problems(adapter, SHAPES))


@pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        (r"(.+)(.+)(.+)(.+)(.+)(.+)(.+)(.+)\4\3", "takes more than 0.2 s to match, at the pattern "),
        ("(", "holds the pattern '(', which is none"),
    ],
    ids=["slow", "none"],
)
def test_a_pattern_that_would_hold_up_the_engine_is_found(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, setting: str, pattern: str, problem: str
) -> None:
    monkeypatch.setattr(file_validation, "_MATCHING_S", 0.2)
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | {setting: {MODULE: 2, pattern: 2}}))

    (only_problem,) = adapter_problems(adapter, SHAPES)

    assert only_problem.startswith(f"{setting} {problem}")


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"peft_type": "IA3"}, "not 'LORA'"),
        ({"r": 0}, "r is not a whole number"),
        ({"r": True}, "r is not a whole number"),
        ({"r": 10**400}, "r is not a whole number"),
        ({"use_dora": True}, "DoRA"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is set"),
        *(
            ({"lora_alpha": alpha}, "lora_alpha or alpha_pattern is not a number, or so large")
            for alpha in (float("nan"), float("inf"), 1e308, 10**400, -1e6, "4", None, True)
        ),
        ({"alpha_pattern": {MODULE: 4, "other": float("nan")}}, "lora_alpha or alpha_pattern is not a number"),
    ],
)
def test_a_configuration_that_the_engine_would_take_otherwise_is_found(
    tmp_path: Path, config: dict[str, Any], problem: str
) -> None:
    adapter = write_adapter(tmp_path / "adapter", "pirate", **config)

    assert any(problem in message for message in adapter_problems(adapter, SHAPES))


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"r":' * 50_000, b'{"a": "\\ud800"}'])
def test_a_configuration_that_is_no_json_object_is_refused(adapter: Path, content: bytes) -> None:
    (adapter / CONFIG).write_bytes(content)

    with pytest.raises(AdapterRejected, match="is damaged"):
        adapter_problems(adapter, SHAPES)


def header(**tensors: object) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04pickle",
        (1 << 63).to_bytes(8, "little"),
        header(a={"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}),
        header(a={"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}) + bytes(8),
        header(a={"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}) + bytes(4),
        header(a={"dtype": "F32", "shape": [1 << 62], "data_offsets": [0, 4]}) + bytes(4),
        header(a={"dtype": "nope", "shape": [1], "data_offsets": [0, 4]}) + bytes(4),
        header(a={"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}) + bytes(4),
        header(a={"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}) + bytes(4),
        header(a=None) + bytes(4),
        header(a={"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}) + bytes(5),
        header(
            a={"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            b={"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        )
        + bytes(4),
    ],
)
def test_a_file_that_is_no_sound_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / WEIGHTS).write_bytes(content)

    with pytest.raises(AdapterRejected):
        read_header(tmp_path / WEIGHTS)


@given(at=st.integers(0, 400), byte=st.integers(0, 255))
@settings(max_examples=200)
def test_any_changed_byte_is_refused_reported_or_harmless_but_never_a_crash(
    tmp_path_factory: pytest.TempPathFactory, at: int, byte: int
) -> None:
    adapter = write_adapter(tmp_path_factory.mktemp("fuzz") / "adapter", "pirate")
    content = bytearray((adapter / WEIGHTS).read_bytes())
    content[at % len(content)] = byte
    (adapter / WEIGHTS).write_bytes(content)

    with contextlib.suppress(AdapterRejected):
        adapter_problems(adapter, SHAPES)
