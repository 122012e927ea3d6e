"""Targets, which are the machines that serve an artifact, and the formats that vLLM supports on each.

A target is a kind of CPU, or `cuda:` with a compute capability, as in `cuda:8.9`. Kinds of CPU are named after the
instructions by which vLLM 0.32 and its libraries choose their kernels:

    cpu               none of the following instructions
    cpu:avx512        AVX-512, without VNNI
    cpu:avx512-vnni   AVX-512 and VNNI
    cpu:amx           AVX-512, VNNI and AMX tiles

The reasons, by format (files of vLLM 0.32 unless said otherwise):

- w8a8-int8: `CPUInt8ScaledMMLinearKernel` (kernels/linear/scaled_mm/cpu.py) takes the SGL kernel where
  `check_cpu_sgl_kernel` (layers/utils.py) finds AMX tiles, inputs in multiples of 32 and outputs in multiples of 16.
  Every other layer goes to oneDNN. oneDNN keeps the packed weight itself and sets `layer.weight` to None, which
  `_get_lora_device` (lora/layers/utils.py) then asks for its device: an engine with adapters stops while it loads.
  Without VNNI, oneDNN adds two products of int8 in 16 bits, which they can exceed.
- w4a16: `CPUWNA16LinearKernel` (kernels/linear/mixed_precision/cpu.py) accepts every CPU. Its C++ code is compiled
  for AVX-512 only: on another CPU the engine loads, and stops at the first request.
- fp8-dynamic: torch computes the product, unless the CPU has AMX-FP8 (`CPUFP8W8A8ScaledMMLinearKernel`).
- nf4: where the CPU has AVX-512, bitsandbytes 0.50 takes wrong scales for rows that end inside a block of 64.

The CPU's maker makes no difference. Nor does support of BF16, by which `import_kernels` (platforms/cpu.py) chooses
between two libraries with AVX-512. `zentorch`, AMD's kernels, is not installed.

Sources. `seen`: run by the tests in tests/e2e/formats on a CPU of that kind, with vLLM's CPU build 0.32. `vllm`: what
vLLM 0.32 documents and its source requires, not run: the files above, docs/features/quantization (fp8: W8A8 from 8.9,
weight-only from 7.5; int8: from 7.5 and below 10.0), `get_min_capability` of its compressed-tensors schemes and of
vllm-bnb-plugin 0.0.3.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from convert.artifact import QuantizationName
from convert.errors import FormatRefused, TargetUnknown

Evidence = Literal["seen", "vllm"]
MergedFormat = Literal["none", "nf4", "w8a8-int8", "fp8-dynamic", "w4a16"]
QUANTIZATIONS: tuple[QuantizationName, ...] = get_args(QuantizationName)
CPUS = ("cpu", "cpu:avx512", "cpu:avx512-vnni", "cpu:amx")
EXAMPLES = (*CPUS, "cuda:7.5", "cuda:8.0", "cuda:8.9", "cuda:9.0", "cuda:10.0", "cuda:12.0")

_Capability = tuple[int, int]
_CUDA = re.compile(r"cuda:(?P<major>\d{1,2})\.(?P<minor>\d)")
_OLDEST: _Capability = (7, 5)
_FP8: _Capability = (8, 9)
_BLACKWELL: _Capability = (10, 0)
_CPUINFO = Path("/proc/cpuinfo")
# Flags of /proc/cpuinfo. vLLM's AVX-512 library is compiled with all four.
_AVX512 = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq"})
_VNNI = _AVX512 | {"avx512_vnni"}
_AMX = _VNNI | {"amx_tile", "amx_int8"}


@dataclass(frozen=True)
class Multiples:
    """Numbers that must divide the inputs and the outputs of every quantized layer."""

    inputs: int = 1
    outputs: int = 1
    only_with_adapter: bool = False

    def divide(self, shape: tuple[int, int]) -> bool:
        """`shape`: (out, in)."""
        return shape[0] % self.outputs == 0 and shape[1] % self.inputs == 0


@dataclass(frozen=True)
class Support:
    """Whether vLLM loads a format on a target, generates with it, and generates with a LoRA adapter on top.

    All of this is true only of layers whose sizes `multiples` divide.
    """

    loads: bool
    generates: bool
    with_adapter: bool
    evidence: Evidence
    note: str = ""
    multiples: Multiples = Multiples()


_ADAPTER_STOPS = "with an adapter vLLM 0.32 stops while it loads"
_SATURATES = "sums of large products saturate without VNNI, which no measurement of the weights shows"
_WIDTHS_NF4 = "widths must be multiples of 64: else bitsandbytes 0.50 takes wrong scales"
_WIDTHS_W4A16 = "widths must be multiples of 32"
_WIDTHS_AMX = "with an adapter widths must be multiples of 32: else vLLM 0.32 stops while it loads"
_OF_NF4 = Multiples(inputs=64)
_OF_W4A16 = Multiples(inputs=32)
_OF_AMX = Multiples(inputs=32, outputs=16, only_with_adapter=True)

_Table = Mapping[QuantizationName, Support]
_CPU: _Table = {
    "none": Support(True, True, True, "seen"),
    "nf4": Support(True, True, True, "vllm"),
    "nf4-double": Support(True, True, True, "seen"),
    "w8a8-int8": Support(True, True, False, "seen", f"{_SATURATES}; {_ADAPTER_STOPS}"),
    "fp8-dynamic": Support(True, True, True, "seen", "slow: emulated"),
    "w4a16": Support(True, False, False, "seen", "stops at the first request: the kernel needs AVX-512"),
}
_AVX512_VNNI: _Table = {
    "none": Support(True, True, True, "seen"),
    "nf4": Support(True, True, True, "seen", _WIDTHS_NF4, _OF_NF4),
    "nf4-double": Support(True, True, True, "seen", _WIDTHS_NF4, _OF_NF4),
    "w8a8-int8": Support(True, True, False, "seen", _ADAPTER_STOPS),
    "fp8-dynamic": Support(True, True, True, "seen", "slow: emulated"),
    "w4a16": Support(True, True, True, "seen", _WIDTHS_W4A16, _OF_W4A16),
}


def _unseen(table: _Table) -> dict[QuantizationName, Support]:
    return {name: replace(row, evidence="vllm") for name, row in table.items()}


_ON_CPU: Mapping[str, _Table] = {
    "cpu": _CPU,
    "cpu:avx512": _unseen(_AVX512_VNNI) | {"w8a8-int8": replace(_CPU["w8a8-int8"], evidence="vllm")},
    "cpu:avx512-vnni": _AVX512_VNNI,
    "cpu:amx": _unseen(_AVX512_VNNI)
    | {
        "w8a8-int8": Support(True, True, True, "seen", _WIDTHS_AMX, _OF_AMX),
        "fp8-dynamic": Support(True, True, True, "vllm", "slow without AMX-FP8"),
    },
}


def require_known(target: str) -> None:
    """Raises TargetUnknown for a name that no target has, and for a GPU that vLLM does not run on."""
    if target in CPUS:
        return
    capability = _capability(target)
    if capability is None:
        raise TargetUnknown(
            f"{target!r} is no target. Targets are {', '.join(EXAMPLES)} and other compute capabilities."
        )
    if capability < _OLDEST:
        raise TargetUnknown(f"{target}: vLLM needs a GPU of compute capability 7.5 or higher. Take cpu.")


def support(target: str, quantization: QuantizationName) -> Support:
    """What vLLM does with a format on a target. Raises TargetUnknown."""
    require_known(target)
    capability = _capability(target)
    if capability is None:
        return _ON_CPU[target][quantization]
    if quantization == "w8a8-int8" and capability >= _BLACKWELL:
        return Support(False, False, False, "vllm", "no int8 kernels from compute capability 10.0")
    if quantization == "fp8-dynamic" and capability < _FP8:
        return Support(True, True, True, "vllm", "weights only: activations stay in 16 bits")
    return Support(True, True, True, "vllm")


def works(
    target: str, quantization: QuantizationName, *, with_adapter: bool, shapes: Collection[tuple[int, int]] = ()
) -> bool:
    """Whether vLLM generates with a format on a target, and with an adapter on top if `with_adapter`.

    `shapes`: (out, in) of the layers that are quantized.
    """
    supported = support(target, quantization)
    if with_adapter and not supported.with_adapter:
        return False
    return supported.loads and supported.generates and not _unfit(supported, shapes, with_adapter=with_adapter)


def _unfit(supported: Support, shapes: Collection[tuple[int, int]], *, with_adapter: bool) -> list[tuple[int, int]]:
    multiples = supported.multiples
    if multiples.only_with_adapter and not with_adapter:
        return []
    return sorted({shape for shape in shapes if not multiples.divide(shape)})


def merged_order(target: str) -> tuple[MergedFormat, ...]:
    """The formats of a merged model to try for a target, in this order; 16 bits is the last. Raises TargetUnknown."""
    require_known(target)
    capability = _capability(target)
    candidates: tuple[MergedFormat, ...] = ("nf4",)
    if target in ("cpu:avx512-vnni", "cpu:amx"):
        candidates = ("nf4", "w8a8-int8")
    elif capability:
        candidates = ("w4a16", "fp8-dynamic" if capability >= _FP8 else "w8a8-int8")
    order = [name for name in candidates if works(target, name, with_adapter=False)]
    return (*order, "none")


def require_works(
    target: str, quantization: QuantizationName, shapes: Collection[tuple[int, int]], *, with_adapter: bool
) -> None:
    """Raises FormatRefused where it does not work for layers of these shapes, with the names of the formats that do."""
    if works(target, quantization, with_adapter=with_adapter, shapes=shapes):
        return
    others = ", ".join(name for name in QUANTIZATIONS if works(target, name, with_adapter=with_adapter, shapes=shapes))
    supported = support(target, quantization)
    note = f": {supported.note}" if supported.note else ""
    if unfit := _unfit(supported, shapes, with_adapter=with_adapter):
        note += f"; here a layer has {unfit[0][1]} inputs and {unfit[0][0]} outputs"
    raise FormatRefused(
        f"vLLM doesn't serve {quantization}{' with an adapter' if with_adapter else ''} on {target}{note}. "
        f"It does serve {others}. Choose one with --quantize, or say where it will be served with --target."
    )


def target_here(cpuinfo: Path = _CPUINFO) -> str:
    """This machine as a target: its first GPU if torch sees one, else its CPU."""
    import torch

    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(0)
        return f"cuda:{major}.{minor}"
    flags = _flags(cpuinfo)
    kinds = (("cpu:amx", _AMX), ("cpu:avx512-vnni", _VNNI), ("cpu:avx512", _AVX512))
    return next((kind for kind, needed in kinds if flags >= needed), "cpu")


def _capability(target: str) -> _Capability | None:
    match = _CUDA.fullmatch(target)
    return (int(match["major"]), int(match["minor"])) if match else None


def _flags(cpuinfo: Path) -> set[str]:
    try:
        text = cpuinfo.read_text(errors="replace")
    except OSError:
        return set()
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return set(flags[1].split()) if flags else set()
