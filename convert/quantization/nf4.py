"""NF4 (https://arxiv.org/abs/2305.14314, section 3): 4-bit weights as bitsandbytes stores them.

On disk a linear layer `X` of shape (out, in) is

    X.weight                                 uint8 [out·in/2, 1]   two codes in a byte
    X.weight.absmax                          one scale for 64 weights: float32, or uint8 with double quantization
    X.weight.quant_map                       float32 [16]          the 16 values of the code
    X.weight.nested_absmax                   float32               double quantization only: one for 256 scales
    X.weight.nested_quant_map                float32 [256]         double quantization only
    X.weight.quant_state.bitsandbytes__nf4   uint8                 JSON: shape, dtype, block sizes, nested offset

as `bitsandbytes.functional.QuantState.as_dict(packed=True)` writes it and transformers and vLLM read it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.artifact import QuantizationName
from convert.errors import BaseUnreadable
from convert.safetensors_io.tensors import DTYPES, FLOATS, Tensors, TensorSpec

if TYPE_CHECKING:
    import torch

STATE = "quant_state.bitsandbytes__nf4"

BLOCK = 64  # weights with one scale
_NESTED_BLOCK = 256
_QUANTIZED_AT_ONCE = 1 << 20  # whole blocks
# The longest text of a float: sign, 17 digits, point, exponent. The nested offset is known only after quantizing, but
# the size of the JSON that holds it is planned before: the JSON is padded with spaces to the length with this float.
_LONGEST_FLOAT = -1.2345678901234567e-100
_MAX_STATE_BYTES = 1 << 16


@dataclass(frozen=True)
class Nf4:
    """The `QuantizationFormat` of bitsandbytes' NF4. `dtype`: the type of the weights before they were quantized."""

    double: bool = True
    dtype: str = "BF16"

    @property
    def name(self) -> QuantizationName:
        return "nf4-double" if self.double else "nf4"

    @property
    def torch_dtype(self) -> str:
        return DTYPES[self.dtype][1]

    def specs(self, module: str, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        name = f"{module}.weight"
        count = math.prod(shape)
        blocks = math.ceil(count / BLOCK)
        specs = [
            TensorSpec(name, "U8", (math.ceil(count / 2), 1)),
            TensorSpec(f"{name}.absmax", "U8" if self.double else "F32", (blocks,)),
            TensorSpec(f"{name}.quant_map", "F32", (16,)),
            TensorSpec(f"{name}.{STATE}", "U8", (_state_bytes(shape, self),)),
        ]
        if self.double:
            specs.append(TensorSpec(f"{name}.nested_absmax", "F32", (math.ceil(blocks / _NESTED_BLOCK),)))
            specs.append(TensorSpec(f"{name}.nested_quant_map", "F32", (256,)))
        return tuple(specs)

    def quantize(self, module: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """A float32 weight is quantized without rounding it to 16 bits first."""
        import torch

        codes, state = _quantized(weight.contiguous(), nested=self.double)
        state.dtype = getattr(torch, self.torch_dtype)
        parts: dict[str, torch.Tensor] = state.as_dict(packed=True)
        text = bytes(parts[STATE].tolist()).ljust(_state_bytes(tuple(weight.shape), self))
        parts[STATE] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        name = f"{module}.weight"
        return {name: codes, **{f"{name}.{part}": tensor for part, tensor in parts.items()}}

    def dequantize(self, module: str, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit

        state = _quant_state(module, parts)
        shape, state.shape = state.shape, _scale_shape(math.prod(state.shape))
        weight: torch.Tensor = dequantize_4bit(parts[f"{module}.weight"], state)
        return weight.view(shape)

    def scales(self, module: str, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The float32 scale of every 64 weights. `parts`: all stored tensors except the codes."""
        from bitsandbytes.functional import dequantize_blockwise

        state = _quant_state(module, parts)
        if not state.nested:
            return state.absmax.float()
        scales: torch.Tensor = dequantize_blockwise(state.absmax, state.state2) + state.offset
        return scales

    def dequantize_block(self, codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        """Some rows of a weight in float32, from their codes and scales; the same bits as from `dequantize`."""
        import torch
        from bitsandbytes.functional import QuantState, dequantize_4bit

        state = QuantState(
            scales, _scale_shape(math.prod(shape)), dtype=torch.float32, blocksize=BLOCK, quant_type="nf4"
        )
        weight: torch.Tensor = dequantize_4bit(codes, state)
        return weight.view(shape)

    def config(self, float_parts: Sequence[str] = ()) -> dict[str, Any]:
        """The `quantization_config` as transformers writes it."""
        from transformers import BitsAndBytesConfig

        # transformers compares with the beginning of a module's path, vLLM with each name in it.
        names = dict.fromkeys(name for part in float_parts for name in (part, part.removeprefix("model.")))
        config: dict[str, Any] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=self.double,
            bnb_4bit_compute_dtype=self.torch_dtype,
            llm_int8_skip_modules=["lm_head", *names] if names else None,
        ).to_dict()
        return config


def _quantized(weight: torch.Tensor, *, nested: bool) -> tuple[torch.Tensor, Any]:
    """What `quantize_4bit` of bitsandbytes gives. That takes 20 bytes a weight: here, of a piece of them."""
    import torch
    from bitsandbytes.functional import quantize_4bit, quantize_blockwise

    pieces = [quantize_4bit(piece, quant_type="nf4") for piece in weight.view(-1).split(_QUANTIZED_AT_ONCE)]
    codes, state = torch.cat([codes for codes, _ in pieces]), pieces[0][1]
    state.shape, state.absmax = weight.shape, torch.cat([piece.absmax for _, piece in pieces])
    if nested:
        state.nested, state.offset = True, state.absmax.mean()
        state.absmax, state.state2 = quantize_blockwise(state.absmax - state.offset, blocksize=_NESTED_BLOCK)
    return codes, state


def _scale_shape(count: int) -> torch.Size:
    """A shape for `count` weights in which every row has one scale, or else one row.

    Where a row ends inside a group of weights with one scale, bitsandbytes 0.50 takes wrong scales on a CPU with
    AVX-512.
    """
    import torch

    return torch.Size((count // BLOCK, BLOCK) if count % BLOCK == 0 else (1, count))


def _quant_state(module: str, parts: Mapping[str, torch.Tensor]) -> Any:
    """bitsandbytes' state of a weight, from its stored tensors, set to dequantize to float32."""
    import torch
    from bitsandbytes.functional import QuantState

    name = f"{module}.weight"
    state = QuantState.from_dict(
        {part.removeprefix(f"{name}."): tensor for part, tensor in parts.items() if part != name},
        device=torch.device("cpu"),
    )
    state.dtype = torch.float32
    return state


def _state_bytes(shape: tuple[int, ...], settings: Nf4) -> int:
    """The length of the JSON in `quant_state`, with the longest nested offset."""
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": settings.torch_dtype,
        "shape": shape,
    }
    if settings.double:
        state |= {
            "nested_blocksize": _NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": _LONGEST_FLOAT,
        }
    return len(json.dumps(state))


def require_nf4(root: Path, quantization: Mapping[str, Any]) -> None:
    """Raises BaseUnreadable for a configuration of bitsandbytes that is not NF4."""
    if quantization.get("bnb_4bit_quant_type") != "nf4" or not quantization.get("load_in_4bit"):
        kind = quantization.get("bnb_4bit_quant_type") if quantization.get("load_in_4bit") else "8-bit"
        raise BaseUnreadable(
            f"{root} is stored as {kind} by bitsandbytes. Give the original model, or one stored as NF4."
        )


def stored_layer(root: Path, tensors: Tensors, module: str) -> tuple[Nf4, tuple[int, int]]:
    """Format and shape of a layer. Raises BaseUnreadable unless all of its parts have the sizes that its state says.

    The sizes are checked because the dequantizer is native code that doesn't check them.
    """
    name = f"{module}.weight"
    shape, dtype = _state(root, tensors, name)
    settings = Nf4(double=f"{name}.nested_absmax" in tensors, dtype=dtype)
    for expected in settings.specs(module, shape):
        if not expected.name.endswith(STATE) and tensors.specs.get(expected.name) != expected:
            raise BaseUnreadable(
                f"{root}: {expected.name!r} should be {expected.dtype} {list(expected.shape)} in NF4 "
                f"of shape {list(shape)}. Copy or save the model again."
            )
    return settings, shape


def _state(root: Path, tensors: Tensors, name: str) -> tuple[tuple[int, int], str]:
    """Shape and type of the weight before it was quantized. Raises BaseUnreadable."""
    key = f"{name}.{STATE}"
    try:
        if tensors.specs[key].nbytes > _MAX_STATE_BYTES:
            raise ValueError("too long")
        return _parse_state(b"".join(tensors.chunks(key)), nested=f"{name}.nested_absmax" in tensors)
    except (ValueError, KeyError, TypeError, StopIteration, RecursionError) as cause:
        raise BaseUnreadable(
            f"{root}: {key!r} is not what bitsandbytes writes ({cause!r}). Save the model again."
        ) from None


def _parse_state(text: bytes, *, nested: bool) -> tuple[tuple[int, int], str]:
    """Every key is checked, since bitsandbytes' own reader takes them all and expects what it writes."""
    state = json.loads(text)
    expected: dict[str, object] = {"quant_type": "nf4", "blocksize": BLOCK}
    if nested:
        expected |= {"nested_blocksize": _NESTED_BLOCK, "nested_dtype": "float32"}
    if set(state) != {"dtype", "shape", *expected, *(("nested_offset",) if nested else ())}:
        raise ValueError(f"its keys are {sorted(state)}")
    if wrong := [key for key, value in expected.items() if state[key] != value or type(state[key]) is not type(value)]:
        raise ValueError(f"{wrong[0]} is {state[wrong[0]]!r}, not {expected[wrong[0]]!r}")
    rows, columns = state["shape"]
    if type(rows) is not int or type(columns) is not int or rows < 1 or columns < 1:
        raise ValueError(f"shape {state['shape']!r}")
    if nested and (type(state["nested_offset"]) is not float or not math.isfinite(state["nested_offset"])):
        raise ValueError(f"nested_offset {state['nested_offset']!r}")
    dtype = next(dtype for dtype in FLOATS if DTYPES[dtype][1] == state["dtype"])
    return (rows, columns), dtype
