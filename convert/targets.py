"""Where an artifact will be served, and which formats vLLM loads and generates with there.

A target is `cpu`, `cpu:avx512`, or `cuda:` with a compute capability, as in `cuda:8.9`. Loading proves nothing: on a
CPU without AVX-512 vLLM loads w4a16 and stops at the first request.

Sources. `seen`: run by the tests in tests/e2e/formats, with vLLM's CPU build 0.32, on CPUs with AVX-512 and without.
`vllm`: what vLLM 0.32 documents and its source requires, not run here: docs/features/quantization (fp8: W8A8 from 8.9,
weight-only from 7.5; int8: from 7.5 and below 10.0), `get_min_capability` of its compressed-tensors schemes and of
vllm-bnb-plugin 0.0.3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from convert.artifact import QuantizationName
from convert.errors import FormatRefused, TargetUnknown

Evidence = Literal["seen", "vllm"]
MergedForm = Literal["none", "nf4", "w8a8-int8", "fp8-dynamic", "w4a16"]
QUANTIZATIONS: tuple[QuantizationName, ...] = get_args(QuantizationName)
EXAMPLES = ("cpu", "cpu:avx512", "cuda:7.5", "cuda:8.0", "cuda:8.9", "cuda:9.0", "cuda:10.0", "cuda:12.0")

_Capability = tuple[int, int]
_CUDA = re.compile(r"cuda:(?P<major>\d{1,2})\.(?P<minor>\d)")
_OLDEST: _Capability = (7, 5)
_FP8: _Capability = (8, 9)
_BLACKWELL: _Capability = (10, 0)
_CPUINFO = Path("/proc/cpuinfo")
# What vLLM's AVX-512 kernels are compiled with.
_AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}


@dataclass(frozen=True)
class Support:
    """What vLLM does with a format on a target: starts, answers, and answers with a LoRA adapter on top."""

    loads: bool
    generates: bool
    with_adapter: bool
    evidence: Evidence
    note: str = ""


@dataclass(frozen=True)
class Defaults:
    """The formats to take where nothing else is asked for.

    `base`: under a separate adapter that was trained in full precision. One that was trained on NF4 stays on NF4.
    """

    merged: QuantizationName
    base: QuantizationName


_WORKS = Support(True, True, True, "seen")
_CPU: Mapping[QuantizationName, Support] = {
    "none": _WORKS,
    "nf4": _WORKS,
    "nf4-double": _WORKS,
    "w8a8-int8": Support(
        True,
        True,
        False,
        "seen",
        "sums of large products saturate without VNNI, which no measurement of the weights shows; "
        "with an adapter vLLM 0.32 stops while it loads",
    ),
    "fp8-dynamic": Support(True, True, True, "seen", "slow: emulated"),
    "w4a16": Support(True, False, False, "seen", "stops at the first request: the kernel needs AVX-512"),
}
_NF4_AVX512 = Support(
    True, True, True, "seen", "widths must be multiples of 64: else bitsandbytes 0.50 takes wrong scales"
)
_CPU_AVX512: Mapping[QuantizationName, Support] = {
    "none": _WORKS,
    "nf4": _NF4_AVX512,
    "nf4-double": _NF4_AVX512,
    "w8a8-int8": Support(True, True, False, "seen", "with an adapter vLLM 0.32 stops while it loads"),
    "fp8-dynamic": Support(True, True, True, "seen", "slow without AMX-FP8"),
    "w4a16": Support(True, True, True, "seen", "widths must be multiples of 32"),
}


def require_known(target: str) -> None:
    """Raises TargetUnknown for a name that no target has, and for a GPU that vLLM does not run on."""
    if target in ("cpu", "cpu:avx512"):
        return
    capability = _capability(target)
    if capability is None:
        raise TargetUnknown(
            f"{target!r} is no target. Targets are {', '.join(EXAMPLES)} and other compute capabilities."
        )
    if capability < _OLDEST:
        raise TargetUnknown(f"{target}: vLLM needs a GPU of compute capability 7.5 or higher. Take cpu.")


def support(target: str, quantization: QuantizationName) -> Support:
    """What vLLM does with the format there. Raises TargetUnknown."""
    require_known(target)
    capability = _capability(target)
    if capability is None:
        return (_CPU if target == "cpu" else _CPU_AVX512)[quantization]
    if quantization == "w8a8-int8" and capability >= _BLACKWELL:
        return Support(False, False, False, "vllm", "no int8 kernels from compute capability 10.0")
    if quantization == "fp8-dynamic" and capability < _FP8:
        return Support(True, True, True, "vllm", "weights only: activations stay in 16 bits")
    return Support(True, True, True, "vllm")


def defaults(target: str) -> Defaults:
    """Raises TargetUnknown."""
    require_known(target)
    capability = _capability(target)
    if capability is None:
        # Without VNNI oneDNN adds two products of int8 in 16 bits, which they can exceed.
        return Defaults("nf4-double" if target == "cpu" else "w8a8-int8", "nf4-double")
    return Defaults("fp8-dynamic" if capability >= _FP8 else "w4a16", "w4a16")


def works(target: str, quantization: QuantizationName, *, with_adapter: bool) -> bool:
    """Whether vLLM answers there, with an adapter on top if asked."""
    found = support(target, quantization)
    return found.loads and found.generates and (found.with_adapter or not with_adapter)


def merged_order(target: str) -> tuple[MergedForm, ...]:
    """Formats of a merged model that vLLM answers with there, worth trying in this order; 16 bits at last."""
    require_known(target)
    first = defaults(target).merged
    wanted: tuple[MergedForm, ...] = ("w4a16", "fp8-dynamic" if first == "fp8-dynamic" else "w8a8-int8")
    if not target.startswith("cuda"):
        wanted = ("nf4", "w8a8-int8") if first == "w8a8-int8" else ("nf4",)
    order = [name for name in dict.fromkeys(wanted) if works(target, name, with_adapter=False)]
    return (*order, "none")


def require_works(target: str, quantization: QuantizationName, *, with_adapter: bool) -> None:
    """Raises FormatRefused where vLLM doesn't answer with it there, naming the formats with which it does."""
    if works(target, quantization, with_adapter=with_adapter):
        return
    others = ", ".join(name for name in QUANTIZATIONS if works(target, name, with_adapter=with_adapter))
    note = support(target, quantization).note
    raise FormatRefused(
        f"vLLM doesn't serve {quantization}{' with an adapter' if with_adapter else ''} on {target}"
        f"{': ' + note if note else ''}. It does serve {others}. Choose one with --quantize, or say where it will be "
        "served with --target."
    )


def target_here(cpuinfo: Path = _CPUINFO) -> str:
    """The target that this machine is: its first GPU where torch sees one, else its CPU."""
    import torch

    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(0)
        return f"cuda:{major}.{minor}"
    return "cpu:avx512" if _has_avx512(cpuinfo) else "cpu"


def _capability(target: str) -> _Capability | None:
    match = _CUDA.fullmatch(target)
    return (int(match["major"]), int(match["minor"])) if match else None


def _has_avx512(cpuinfo: Path) -> bool:
    try:
        text = cpuinfo.read_text(errors="replace")
    except OSError:
        return False
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return flags is not None and set(flags[1].split()) >= _AVX512
