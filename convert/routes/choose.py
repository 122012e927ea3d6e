"""The choice of a route, and the refusal of those that would lose what was learnt."""

from __future__ import annotations

from dataclasses import dataclass, replace

from convert.base_model import BaseModel
from convert.detect import Detection, Training
from convert.errors import BaseMismatch, RouteRefused
from convert.nf4 import Nf4
from convert.plan import Form
from convert.routes.ways import CHOICES, DtypeOption, QuantizeOption, RouteOption, Way, ways_for

REFUSED_MERGE = (
    "The adapter was trained against the dequantized 4-bit weights of its base. Writing their sum back on the same "
    "4-bit grid rounds nearly all of the delta away, and adding it to the original weights makes another function."
)
_REFUSED_ADAPTER = (
    "The adapter was trained against 4-bit weights: a separate adapter belongs on the 4-bit base. "
    "In 16 bits the exact model is the merged one."
)

_DTYPES = {"bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class Choice:
    """What will be done. `form` is None where the base artifact's model is referenced instead of written again."""

    way: Way
    form: Form | None
    quantizer: Nf4 | None
    measured: bool
    reason: str


def choose(
    found: Detection,
    base: BaseModel,
    route: RouteOption,
    quantize: QuantizeOption,
    command: str,
    dtype: DtypeOption = "auto",
) -> Choice:
    """Raises RouteRefused naming the commands that work, and BaseMismatch where the base can't carry the way.

    `command` is the command without `--route` and `--quantize`, to be shown with those that work.
    """
    way = CHOICES.get((found.training, route, quantize))
    if way is None:
        raise RouteRefused(_refusal(route, found.training, command))
    choice = _choose_qlora(way, found, base) if found.training is Training.QLORA else _choose_lora(way, base)
    return choice if dtype == "auto" else _in_type(choice, dtype)


def _in_type(choice: Choice, dtype: DtypeOption) -> Choice:
    if choice.form is None or choice.form.merged_onto is None or choice.form.stored:
        raise RouteRefused(
            f"--dtype {dtype} is for a merged model that is not quantized: add --route merge --quantize none."
        )
    return replace(choice, form=replace(choice.form, dtype=_DTYPES[dtype]))


def _refusal(route: RouteOption, training: Training, command: str) -> str:
    why = REFUSED_MERGE if route == "merge" else _REFUSED_ADAPTER
    commands = "".join(f"\n  {command} {way.flags}\n      {way.loss}; {way.serving}" for way in ways_for(training))
    return f"{why} What works:{commands}"


def _choose_qlora(way: Way, found: Detection, base: BaseModel) -> Choice:
    quantizer, caveat = _quantizer(found, base)
    form: Form | None = Form("dequantized", None, quantizer) if way.route == "merge" else Form(None, quantizer)
    if way.route == "adapter" and base.artifact and base.is_quantized:
        form = None
    return Choice(way, form, quantizer, way.route == "merge", _sentence(way.why, caveat))


def _quantizer(found: Detection, base: BaseModel) -> tuple[Nf4, str]:
    """The quantizer of training and, where a part of it is only assumed, a sentence that says so."""
    double = found.quantizer.double if found.quantizer else None
    if isinstance(base.settings, Nf4):
        if double is not None and double != base.settings.double:
            words = {True: "with double quantization", False: "without double quantization"}
            raise BaseMismatch(
                f"{base.root} is stored as NF4 {words[base.settings.double]}, the adapter was trained {words[double]}. "
                "Give the full-precision base: it is then quantized as in training."
            )
        return base.settings, ""
    if base.is_quantized:
        raise BaseMismatch(
            f"{base.root} is stored as {base.quantization}, the adapter was trained on NF4. Give the full-precision "
            "base: it is then quantized as in training."
        )
    if double is None:
        return Nf4(True, base.dtype), "double quantization is assumed, nothing says whether training used it"
    return Nf4(double, base.dtype), ""


def _choose_lora(way: Way, base: BaseModel) -> Choice:
    stored = Nf4(True, base.dtype) if way.nf4 else None
    if way.route == "merge":
        _require_full_precision(base, "The delta of a LoRA belongs on the full-precision weights it was trained on")
        return Choice(way, Form("original", stored), None, True, _sentence(way.why))
    if not way.nf4:
        _require_full_precision(base, "Without quantization the base is served in full precision")
        return Choice(way, None if base.artifact else Form(None, None), None, False, _sentence(way.why))
    if base.is_quantized:
        caveat = "what that costs was not measured, since the full-precision weights were not given"
        form = None if base.artifact else Form(None, base.settings)
        return Choice(way, form, None, False, _sentence(way.why, caveat))
    return Choice(way, Form(None, stored), None, True, _sentence(way.why))


def _require_full_precision(base: BaseModel, why: str) -> None:
    if base.is_quantized:
        raise BaseMismatch(
            f"{why}; {base.root} holds only their 4-bit form. Give the original model directory with --base."
        )


def _sentence(*parts: str) -> str:
    text = "; ".join(part for part in parts if part)
    return f"{text[0].upper()}{text[1:]}."
