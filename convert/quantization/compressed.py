"""Weights of 8 and 4 bits as the library compressed-tensors stores them; llm-compressor writes and vLLM reads them.

On disk a linear layer `X` of shape (out, in) is

    w8a8-int8     X.weight          int8 [out, in]               activations: int8, one scale for a token
                  X.weight_scale    16-bit [out, 1]
    fp8-dynamic   X.weight          float8_e4m3fn [out, in]      activations: float8_e4m3fn, one scale for a token
                  X.weight_scale    16-bit [out, 1]
    w4a16         X.weight_packed   int32 [out, in/8]            eight codes of 4 bits in one int32
                  X.weight_scale    16-bit [out, in/group]
                  X.weight_shape    int64 [2]                    (out, in)

All are symmetric, and a scale follows from the largest magnitude that it covers. The library computes scales, codes and
packing, from float32 weights and from the scale in the type in which it is stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from convert.errors import BaseUnreadable, FormatRefused
from convert.safetensors_io.tensors import DTYPES, FLOATS, Tensors, TensorSpec

if TYPE_CHECKING:
    import torch

METHOD = "compressed-tensors"
GROUP_SIZES = (128, 64, 32)
CompressedName = Literal["w8a8-int8", "fp8-dynamic", "w4a16"]
NAMES: tuple[CompressedName, ...] = get_args(CompressedName)

_CODES_PER_INT32 = 8
_FORMATS: Mapping[CompressedName, str] = {
    "w8a8-int8": "int-quantized",
    "fp8-dynamic": "float-quantized",
    "w4a16": "pack-quantized",
}
_CODE_DTYPES: Mapping[CompressedName, str] = {"w8a8-int8": "I8", "fp8-dynamic": "F8_E4M3", "w4a16": "I32"}
# Arguments that decide how stored numbers are decoded. The others describe how the quantizer chose them.
_DECODING_ARGUMENTS = (
    "num_bits",
    "type",
    "strategy",
    "symmetric",
    "dynamic",
    "group_size",
    "block_structure",
    "actorder",
)


@dataclass(frozen=True)
class Compressed:
    """A `QuantizationFormat` in compressed-tensors. `dtype`: the type of the scales. `group_size`: w4a16 only."""

    name: CompressedName
    dtype: str = "BF16"
    group_size: int | None = None

    @classmethod
    def fitting(cls, name: CompressedName, in_features: Iterable[int], dtype: str = "BF16") -> Compressed:
        """The format for layers of these widths; of w4a16 with the largest group size that divides all of them.

        All layers have one group size, since engines fuse layers. Raises FormatRefused where no group size fits.
        """
        if name != "w4a16":
            return cls(name, dtype)
        widths = sorted(set(in_features))
        for size in GROUP_SIZES:
            if all(width % size == 0 for width in widths):
                return cls(name, dtype, size)
        unfit = [width for width in widths if width % GROUP_SIZES[-1]]
        raise FormatRefused(
            f"w4a16 stores weights in groups of 128, 64 or 32 that share a scale, and {GROUP_SIZES[-1]} does not "
            f"divide the layers' input width {', '.join(map(str, unfit))}. Take w8a8-int8, fp8-dynamic or nf4."
        )

    def specs(self, module: str, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        rows, columns = shape
        if self.group_size is None:
            return (
                TensorSpec(f"{module}.weight", _CODE_DTYPES[self.name], (rows, columns)),
                TensorSpec(f"{module}.weight_scale", self.dtype, (rows, 1)),
            )
        return (
            TensorSpec(f"{module}.weight_packed", "I32", (rows, columns // _CODES_PER_INT32)),
            TensorSpec(f"{module}.weight_scale", self.dtype, (rows, columns // self.group_size)),
            TensorSpec(f"{module}.weight_shape", "I64", (2,)),
        )

    def quantize(self, module: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Raises FormatRefused for weights that are too large for a scale in 16 bits."""
        compressor, scheme = _library(self)
        weight = weight.float()
        scale = self._scale(weight, scheme.weights)
        if not scale.isfinite().all():
            raise FormatRefused(
                f"{module}: weights up to {float(weight.abs().max()):.3g} have no scale in {scale.dtype}. "
                "Weights this large point to a broken base, or belong in bfloat16."
            )
        parts = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
        return {f"{module}.{part}": tensor for part, tensor in parts.items()}

    def dequantize(self, module: str, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        compressor, scheme = _library(self)
        local = {name.removeprefix(f"{module}."): tensor for name, tensor in parts.items()}
        # The library computes in the scale's type.
        local["weight_scale"] = local["weight_scale"].float()
        weight: torch.Tensor = compressor.decompress(local, scheme)["weight"]
        return weight

    def config(self, float_parts: Sequence[str] = ()) -> dict[str, Any]:
        """As llm-compressor writes it."""
        return {
            "config_groups": {"group_0": self.group() | {"format": _FORMATS[self.name]}},
            "format": _FORMATS[self.name],
            "global_compression_ratio": None,
            "ignore": _ignored(float_parts),
            "kv_cache_scheme": None,
            "quant_method": METHOD,
            "quantization_status": "compressed",
            "sparsity_config": {},
            "transform_config": {},
            "version": version("compressed-tensors"),
        }

    def group(self) -> dict[str, Any]:
        """A group of the library's `config_groups`: what is quantized, weights and activations."""
        number = "float" if self.name == "fp8-dynamic" else "int"
        weights = _arguments(number, strategy="channel", observer="memoryless_minmax")
        if self.group_size:
            weights |= {"num_bits": 4, "strategy": "group", "group_size": self.group_size}
        inputs = None if self.group_size else _arguments(number, strategy="token", dynamic=True)
        return {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}

    def _scale(self, weight: torch.Tensor, arguments: Any) -> torch.Tensor:
        """One scale for each row, or for each group of a row; never 0 in the type in which it is stored."""
        import torch
        from compressed_tensors.quantization.utils import calculate_qparams

        dtype = getattr(torch, DTYPES[self.dtype][1])
        groups = weight.unflatten(1, (-1, self.group_size or weight.shape[1]))
        low, high = torch.aminmax(groups, dim=-1)
        scale: torch.Tensor = calculate_qparams(low, high, arguments)[0]
        return scale.clamp(min=torch.finfo(dtype).tiny).to(dtype)


def _ignored(float_parts: Sequence[str]) -> list[str]:
    """The layers that are not quantized, by patterns where transformers and vLLM have other paths for them."""
    if not float_parts:
        return ["lm_head"]
    return ["re:.*lm_head", *(f"re:.*{part.removeprefix('model.')}.*" for part in float_parts)]


def _arguments(number: str, *, strategy: str, dynamic: bool = False, observer: str | None = None) -> dict[str, Any]:
    return {
        "actorder": None,
        "block_structure": None,
        "dynamic": dynamic,
        "group_size": None,
        "num_bits": 8,
        "observer": observer,
        "observer_kwargs": {},
        "scale_dtype": None,
        "strategy": strategy,
        "symmetric": True,
        "type": number,
        "zp_dtype": None,
    }


@lru_cache(maxsize=8)
def _library(settings: Compressed) -> tuple[Any, Any]:
    """compressed-tensors' compressor and QuantizationScheme of the format."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    compressor = BaseCompressor.get_value_from_registry(_FORMATS[settings.name])
    return compressor, QuantizationScheme.model_validate(settings.group())


def format_of(
    root: Path, quantization: Mapping[str, Any], tensors: Tensors, float_parts: Sequence[str] = ()
) -> Compressed:
    """The format that a `quantization_config` of compressed-tensors describes. Raises BaseUnreadable for any other."""
    ignored: tuple[object, ...] = (None, [], ["lm_head"], _ignored(float_parts))
    for name in NAMES:
        for group_size in GROUP_SIZES if name == "w4a16" else (None,):
            if quantization.get("ignore") in ignored and _is_config_of(
                quantization, Compressed(name, group_size=group_size)
            ):
                return Compressed(name, _scale_dtype(root, tensors), group_size)
    raise BaseUnreadable(
        f"{root} is stored by {METHOD} in a way that is not read here (format {quantization.get('format')!r}). Read "
        f"are {', '.join(NAMES)} with every linear layer but lm_head quantized, symmetric, w4a16 in groups of "
        f"{', '.join(map(str, GROUP_SIZES))}. Give the original model."
    )


def stored_shape(root: Path, tensors: Tensors, module: str, settings: Compressed) -> tuple[int, int]:
    """(out, in) of a layer, whose parts must have the types and shapes of the format. Raises BaseUnreadable."""
    name = f"{module}.{'weight_packed' if settings.group_size else 'weight'}"
    codes = tensors.specs.get(name)
    if codes is None or len(codes.shape) != 2 or 0 in codes.shape:
        raise BaseUnreadable(f"{root}: {module!r} is not stored as {settings.name}. Copy or save the model again.")
    shape = (codes.shape[0], codes.shape[1] * (_CODES_PER_INT32 if settings.group_size else 1))
    for expected in settings.specs(module, shape):
        if tensors.specs.get(expected.name) != expected:
            raise BaseUnreadable(
                f"{root}: {expected.name!r} should be {expected.dtype} {list(expected.shape)} in {settings.name} "
                f"of shape {list(shape)}. Copy or save the model again."
            )
    if settings.group_size:
        _require_shape(root, tensors, f"{module}.weight_shape", shape, settings.group_size)
    return shape


def _require_shape(root: Path, tensors: Tensors, name: str, shape: tuple[int, int], group_size: int) -> None:
    stored = tensors.read(name).tolist()
    if stored != list(shape) or shape[1] % group_size:
        raise BaseUnreadable(
            f"{root}: {name!r} is {stored} where the codes are {list(shape)} in groups of {group_size}. "
            "Copy or save the model again."
        )


def _scale_dtype(root: Path, tensors: Tensors) -> str:
    dtypes = {spec.dtype for name, spec in tensors.specs.items() if name.endswith(".weight_scale")}
    if len(dtypes) != 1 or not dtypes <= set(FLOATS):
        raise BaseUnreadable(
            f"{root} is stored by {METHOD} with scales of {sorted(dtypes) or 'no type'}; expected one of "
            f"{', '.join(FLOATS)}. Copy or save the model again."
        )
    return dtypes.pop()


def _is_config_of(quantization: Mapping[str, Any], settings: Compressed) -> bool:
    """Whether the configuration describes this format, however its scales and codes were chosen."""
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1 or quantization.get("format") != _FORMATS[settings.name]:
        return False
    group, expected = next(iter(groups.values())), settings.group()
    return (
        isinstance(group, dict)
        and group.get("targets") == ["Linear"]
        and group.get("output_activations") is None
        and _decoding_arguments(group.get("weights")) == _decoding_arguments(expected["weights"])
        and _decoding_arguments(group.get("input_activations")) == _decoding_arguments(expected["input_activations"])
        and not any(quantization.get(name) for name in ("kv_cache_scheme", "transform_config", "sparsity_config"))
    )


def _decoding_arguments(arguments: Any) -> object:
    if not isinstance(arguments, dict):
        return arguments
    decoding = {name: arguments.get(name) for name in _DECODING_ARGUMENTS}
    # The order in which GPTQ rounded the columns. With "group" the stored columns are in another order, too.
    if decoding["actorder"] in ("static", "weight", False):
        decoding["actorder"] = None
    if decoding["group_size"] == -1:
        decoding["group_size"] = None
    return decoding
