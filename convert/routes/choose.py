"""The choice of a route, and the refusal of those that would lose what was learnt."""

from __future__ import annotations

from dataclasses import dataclass, replace

from convert.base_model import BaseModel
from convert.detect import Detection, Training
from convert.edits import Edits
from convert.errors import BaseMismatch, RouteRefused
from convert.nf4 import Nf4
from convert.plan import Form
from convert.routes.ways import DtypeOption, OntoOption, QuantizeOption, RouteOption, Storage, Way, find, ways_for
from convert.scheme import Scheme

REFUSED_MERGE = (
    "The adapter was trained against the dequantized 4-bit weights of its base. Writing their sum back on the same "
    "4-bit grid rounds nearly all of the delta away."
)
_REFUSED_ADAPTER = (
    "The adapter was trained against 4-bit weights: a separate adapter belongs on the 4-bit base. "
    "In 16 bits the exact model is the merged one."
)
_REFUSED_ANY = "No way is known that has all of these properties and is honest."

_DTYPES = {"bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class Wish:
    """What the user asks for; `auto` leaves it to us."""

    route: RouteOption = "auto"
    quantize: QuantizeOption = "auto"
    onto: OntoOption = "auto"
    dtype: DtypeOption = "auto"
    force: bool = False

    @property
    def is_open(self) -> bool:
        """Whether the form of a merge is to be found by measuring."""
        return self.quantize == "auto" and self.route in ("auto", "merge")


@dataclass(frozen=True)
class Choice:
    """What will be done. `form` is None where the base artifact's model is referenced instead of written again."""

    way: Way
    form: Form | None
    quantizer: Nf4 | None
    measured: bool
    reason: str


def ways_asked(training: Training, wish: Wish, order: tuple[Storage, ...], command: str) -> tuple[Way, ...]:
    """The ways that a wish leaves open, first to be tried first. Raises RouteRefused naming those that work.

    `order`: forms of a merged model in which the target serves, smallest first. `command`: the command without the
    options of the wish.
    """
    if wish.route == "auto" and wish.quantize in ("auto", "nf4") and training is Training.QLORA:
        return (_found(training, replace(wish, route="adapter"), command),)
    if wish.is_open:
        wish = replace(wish, route="merge")
        storages = [storage for storage in order if storage != "nf4" or training is Training.LORA]
        return tuple(_found(training, replace(wish, quantize=storage), command) for storage in storages)
    return (_found(training, wish, command),)


def choose(way: Way, found: Detection, base: BaseModel, wish: Wish, scheme: Scheme | None) -> Choice:
    """How a way is gone from this base. `scheme`: of the way's storage, None for 16 bits. Raises BaseMismatch."""
    choice = (
        _choose_qlora(way, found, base, scheme) if way.training is Training.QLORA else _choose_lora(way, base, scheme)
    )
    return choice if wish.dtype == "auto" else _in_type(choice, wish.dtype)


def _found(training: Training, wish: Wish, command: str) -> Way:
    route = "merge" if wish.route == "auto" else wish.route
    default: Storage = "nf4" if (route, training) == ("adapter", Training.QLORA) else "none"
    storage: Storage = default if wish.quantize == "auto" else wish.quantize
    if route == "rebase" and training is Training.LORA and wish.quantize == "auto":
        storage = "nf4"
    if route == "adapter" and training is Training.LORA and wish.quantize == "auto":
        storage = "nf4"
    way = find(training, route, storage, wish.onto)
    if way is None or (way.is_same_grid and not wish.force):
        raise RouteRefused(_refusal(route, storage, training, command))
    return way


def _refusal(route: str, storage: Storage, training: Training, command: str) -> str:
    why = _REFUSED_ANY
    if (route, storage, training) == ("merge", "nf4", Training.QLORA):
        why = REFUSED_MERGE
    elif (route, training) == ("adapter", Training.QLORA):
        why = _REFUSED_ADAPTER
    commands = "".join(f"\n  {command} {way.flags}\n      {way.loss}; {way.serving}" for way in ways_for(training))
    return f"{why} What works:{commands}"


def with_baked(choice: Choice, base: BaseModel, edits: Edits) -> Choice:
    """The same choice, where a separate adapter needs a base of its own: it is written, and the reason says so."""
    if choice.way.route != "adapter" or edits.is_empty:
        return choice
    form = choice.form or Form(None, base.settings)
    return replace(choice, form=form, reason=f"{choice.reason} {edits.sentence}")


def _in_type(choice: Choice, dtype: DtypeOption) -> Choice:
    if choice.form is None or choice.form.merged_onto is None or choice.form.stored:
        raise RouteRefused(
            f"--dtype {dtype} is for a merged model that is not quantized: add --route merge --quantize none."
        )
    return replace(choice, form=replace(choice.form, dtype=_DTYPES[dtype]))


def _choose_qlora(way: Way, found: Detection, base: BaseModel, scheme: Scheme | None) -> Choice:
    quantizer, caveat = _quantizer(found, base)
    reason = _sentence(way.why, caveat)
    if way.route == "adapter":
        form = None if base.artifact and base.is_quantized else Form(None, quantizer)
        return Choice(way, form, quantizer, True, reason)
    if way.onto != "dequantized":
        _require_full_precision(base, f"{way.route.capitalize()} needs the full-precision weights")
    if way.route == "rebase":
        return Choice(way, None if base.artifact else Form(None, scheme), quantizer, True, reason)
    if way.is_same_grid:
        scheme = quantizer
    if way.onto == "dequantized":
        return Choice(way, Form("dequantized", scheme, quantizer), quantizer, True, reason)
    return Choice(way, Form("original", scheme), quantizer, True, reason)


def trained_quantizer(found: Detection, base: BaseModel) -> Nf4 | None:
    """What the base went through in training; None for LoRA. Raises BaseMismatch where this base can't tell."""
    return _quantizer(found, base)[0] if found.training is Training.QLORA else None


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
    if found.quantizer and found.quantizer.partial:
        raise BaseMismatch(
            f"The adapter was trained on a 4-bit base that leaves some layers in 16 bits, and only that base says "
            f"which ({'; '.join(found.lines)}). Give that base with --base instead of {base.root}."
        )
    if double is None:
        return Nf4(True, base.dtype), "double quantization is assumed, nothing says whether training used it"
    return Nf4(double, base.dtype), ""


def _choose_lora(way: Way, base: BaseModel, scheme: Scheme | None) -> Choice:
    if way.route == "merge":
        _require_full_precision(base, "The delta of a LoRA belongs on the full-precision weights it was trained on")
        return Choice(way, Form("original", scheme), None, True, _sentence(way.why))
    if way.route == "rebase":
        _require_full_precision(base, "Rebase needs the full-precision weights the adapter was trained on")
        return Choice(way, Form(None, scheme), None, True, _sentence(way.why))
    if scheme is None:
        _require_full_precision(base, "Without quantization the base is served in full precision")
        return Choice(way, None if base.artifact else Form(None, None), None, True, _sentence(way.why))
    if base.is_quantized:
        caveat = "what that costs was not measured, since the full-precision weights were not given"
        form = None if base.artifact else Form(None, base.settings)
        return Choice(way, form, None, False, _sentence(way.why, caveat))
    return Choice(way, Form(None, scheme), None, True, _sentence(way.why))


def _require_full_precision(base: BaseModel, why: str) -> None:
    if base.is_quantized:
        raise BaseMismatch(
            f"{why}; {base.root} holds only their 4-bit form. Give the original model directory with --base."
        )


def _sentence(*parts: str) -> str:
    text = "; ".join(part for part in parts if part)
    return f"{text[0].upper()}{text[1:]}."
