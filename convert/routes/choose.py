"""Chooses the route variant of a conversion, and refuses variants that would lose what was learnt.

`requested_variants` applies this rule, whose first line that fits the options decides:

1. QLoRA, no --route, and --quantize absent or nf4: the adapter stays separate on its 4-bit base, which is exact.
2. LoRA, no --quantize, and --route adapter or no option of the route: where the base is that of an artifact in 16 bits,
   the adapter stays separate on it, which is exact, so that it can be published beside the artifact's own adapter.
3. No --quantize, and --route merge or no --route: a merge whose storage is found by measuring. The storages that the
   target serves are tried in turn, smallest first and 16 bits last (`quantization.targets.merged_order`; for a QLoRA
   without nf4, which would be the grid that it was trained against). Without --route a LoRA that stays separate on its
   16-bit base, which is exact, comes last. The first result that passes the quality gate is published. Where the user
   set no limits, they are those of `quality.gate.DEFAULT_GATE`, and the last result is published even where it misses
   them. Where nothing is measured, the last one is taken.
4. Otherwise one variant. Without --route it is a merge. Without --quantize it is nf4 for a separate adapter and for the
   rebase of a LoRA, and 16 bits for every other route.

Without --merge-onto a merge adds the delta to the weights that the adapter was trained against. A variant that is not
in the table `variants.VARIANTS` is refused, and so is the merge of a QLoRA into its own 4-bit grid without --force.

`choose` then says how a variant is carried out with a given base.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from convert.detection.detect import Detection
from convert.detection.training import Training, TrainingQuantizer
from convert.errors import BaseMismatch, RouteRefused
from convert.inputs.base_model import BaseModel
from convert.plan.conversion_plan import OutputFormat
from convert.plan.weight_updates import WeightUpdates
from convert.quantization.format import QuantizationFormat
from convert.quantization.nf4 import Nf4
from convert.routes.variants import (
    DtypeOption,
    OntoOption,
    QuantizeOption,
    RouteOption,
    RouteVariant,
    Storage,
    find_variant,
    offered_variants,
)

REFUSED_MERGE = (
    "The adapter was trained against the dequantized 4-bit weights of its base. Rounding the sum of these weights "
    "and the delta to the same 4-bit grid removes nearly all of the delta."
)
_REFUSED_ADAPTER = (
    "The adapter was trained against 4-bit weights: a separate adapter belongs on the 4-bit base. "
    "For an exact model in 16 bits, merge it."
)
_OTHER_BASE = (
    "the base of that artifact is in 16 bits, which the adapter was not trained on: this one gets a 4-bit base of its "
    "own and can't be published beside the artifact's adapter"
)
_REFUSED_OTHER = "No route has all of these properties."

_DTYPES = {"bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class RouteOptions:
    """The user's options for the route; `auto` leaves the decision to Graft."""

    route: RouteOption = "auto"
    quantize: QuantizeOption = "auto"
    onto: OntoOption = "auto"
    dtype: DtypeOption = "auto"
    force: bool = False


@dataclass(frozen=True)
class Choice:
    """How a variant is carried out with a given base.

    `output_format`: None where the model of the base artifact is referenced instead of written again. `quantizer`: that
    of the base in training, None for LoRA. `is_measurable`: whether the result can be compared with the function as
    trained. `reason`: a sentence for the manifest.
    """

    variant: RouteVariant
    output_format: OutputFormat | None
    quantizer: Nf4 | None
    is_measurable: bool
    reason: str


def requested_variants(
    training: Training,
    options: RouteOptions,
    merged_storages: tuple[Storage, ...],
    command: str,
    *,
    shares_16_bits: bool = False,
) -> tuple[RouteVariant, ...]:
    """The variants that the user's options leave open, in the order in which they are tried.

    `merged_storages`: storages of a merged model that the target serves, smallest first. `command`: the command line
    without the options of the route, for messages. `shares_16_bits`: whether the base is an artifact's, in 16 bits.
    Raises RouteRefused, which names the variants that work.
    """
    if training is Training.QLORA and options.route == "auto" and options.quantize in ("auto", "nf4"):
        return (_variant(training, replace(options, route="adapter"), command),)
    is_separate = options.route == "adapter" or options in (RouteOptions(), RouteOptions(force=True))
    if training is Training.LORA and shares_16_bits and is_separate and options.quantize == "auto":
        return (_variant(training, replace(options, route="adapter", quantize="none"), command),)
    if options.quantize == "auto" and options.route in ("auto", "merge"):
        merge = replace(options, route="merge")
        storages = [storage for storage in merged_storages if storage != "nf4" or training is Training.LORA]
        merges = tuple(_variant(training, replace(merge, quantize=storage), command) for storage in storages)
        if options.route == "merge" or (options.onto, options.dtype) != ("auto", "auto"):  # options of a merge
            return merges
        return *merges, _variant(training, replace(options, route="adapter", quantize="none"), command)
    return (_variant(training, options, command),)


def choose(
    variant: RouteVariant,
    detection: Detection,
    base: BaseModel,
    options: RouteOptions,
    quantization: QuantizationFormat | None,
) -> Choice:
    """How a variant is carried out with this base.

    `quantization`: the format of the variant's storage, None for 16 bits. Raises BaseMismatch where this base can't
    carry the variant, RouteRefused for a dtype that the variant has no use for.
    """
    if variant.training is Training.QLORA:
        choice = _choose_qlora(variant, detection, base, quantization)
    else:
        choice = _choose_lora(variant, base, quantization)
    return choice if options.dtype == "auto" else _with_dtype(choice, options.dtype)


def with_weight_updates(choice: Choice, base: BaseModel, updates: WeightUpdates) -> Choice:
    """The same choice, except that a separate adapter with weight updates gets a base of its own.

    An adapter file holds LoRA weights only. Other weights that the checkpoint changes are written into the base, and
    the reason says so.
    """
    if choice.variant.route != "adapter" or updates.is_empty:
        return choice
    output_format = choice.output_format or OutputFormat(None, base.quantization_format)
    return replace(choice, output_format=output_format, reason=f"{choice.reason} {updates.reason}")


def trained_quantizer(detection: Detection, base: BaseModel) -> Nf4 | None:
    """The quantizer of the base in training; None for LoRA. Raises BaseMismatch where this base can't show it."""
    return _training_quantizer(detection, base)[0] if detection.training is Training.QLORA else None


def _variant(training: Training, options: RouteOptions, command: str) -> RouteVariant:
    route = "merge" if options.route == "auto" else options.route
    storage = _default_storage(route, training) if options.quantize == "auto" else options.quantize
    variant = find_variant(training, route, storage, options.onto)
    if variant is None or (variant.is_same_grid and not options.force):
        raise RouteRefused(_refusal(route, storage, training, command))
    return variant


def _default_storage(route: str, training: Training) -> Storage:
    is_separate_on_4_bits = route == "adapter" or (route == "rebase" and training is Training.LORA)
    return "nf4" if is_separate_on_4_bits else "none"


def _refusal(route: str, storage: Storage, training: Training, command: str) -> str:
    why = _REFUSED_OTHER
    if (route, storage, training) == ("merge", "nf4", Training.QLORA):
        why = REFUSED_MERGE
    elif (route, training) == ("adapter", Training.QLORA):
        why = _REFUSED_ADAPTER
    commands = "".join(
        f"\n  {command} {variant.flags}\n      {variant.loss}; {variant.serving}"
        for variant in offered_variants(training)
    )
    return f"{why} What works:{commands}"


def _with_dtype(choice: Choice, dtype: DtypeOption) -> Choice:
    output_format = choice.output_format
    if output_format is None or output_format.merged_onto is None or output_format.quantization_format:
        raise RouteRefused(
            f"--dtype {dtype} is for a merged model that is not quantized: add --route merge --quantize none."
        )
    return replace(choice, output_format=replace(output_format, dtype=_DTYPES[dtype]))


def _choose_qlora(
    variant: RouteVariant, detection: Detection, base: BaseModel, quantization: QuantizationFormat | None
) -> Choice:
    quantizer, assumption = _training_quantizer(detection, base)
    if variant.route != "adapter" and variant.onto != "dequantized":
        _require_full_precision(base, f"{variant.route.capitalize()} needs the full-precision weights")
    output_format = _qlora_output_format(variant, base, quantizer, quantization)
    other_base = _OTHER_BASE if variant.route == "adapter" and base.artifact and not base.is_quantized else ""
    reason = _sentence(variant.reason, assumption, other_base)
    return Choice(variant, output_format, quantizer, is_measurable=True, reason=reason)


def _qlora_output_format(
    variant: RouteVariant, base: BaseModel, quantizer: Nf4, quantization: QuantizationFormat | None
) -> OutputFormat | None:
    match variant.route:
        case "adapter":
            return None if base.artifact and base.is_quantized else OutputFormat(None, quantizer)
        case "rebase":
            return None if base.artifact else OutputFormat(None, quantization)
        case "recover":
            return OutputFormat("original", quantization)
        case "merge":
            if variant.onto == "original":
                return OutputFormat("original", quantization)
            return OutputFormat("dequantized", quantizer if variant.is_same_grid else quantization, quantizer)


def _training_quantizer(detection: Detection, base: BaseModel) -> tuple[Nf4, str]:
    """The quantizer of training and, where a part of it is only assumed, a sentence that says so."""
    detected = detection.quantizer or TrainingQuantizer()
    if isinstance(base.quantization_format, Nf4):
        _require_same_double_quantization(base, base.quantization_format, detected)
        return base.quantization_format, ""
    if base.is_quantized:
        raise BaseMismatch(
            f"{base.root} is stored as {base.quantization_name}, the adapter was trained on NF4. Give the "
            "full-precision base: it is then quantized as in training."
        )
    if detected.partial:
        raise BaseMismatch(
            f"The adapter was trained on a 4-bit base that leaves some layers in 16 bits, and only that base says "
            f"which ({'; '.join(detection.sources)}). Give that base with --base instead of {base.root}."
        )
    if detected.double is None:
        return Nf4(True, base.dtype), "double quantization is assumed, nothing says whether training used it"
    return Nf4(detected.double, base.dtype), ""


def _require_same_double_quantization(base: BaseModel, stored: Nf4, detected: TrainingQuantizer) -> None:
    if detected.double is not None and detected.double != stored.double:
        words = {True: "with double quantization", False: "without double quantization"}
        raise BaseMismatch(
            f"{base.root} is stored as NF4 {words[stored.double]}, the adapter was trained {words[detected.double]}. "
            "Give the full-precision base: it is then quantized as in training."
        )


def _choose_lora(variant: RouteVariant, base: BaseModel, quantization: QuantizationFormat | None) -> Choice:
    reason = _sentence(variant.reason)
    if variant.route == "merge":
        _require_full_precision(base, "The delta of a LoRA belongs on the full-precision weights it was trained on")
        return Choice(variant, OutputFormat("original", quantization), None, is_measurable=True, reason=reason)
    if variant.route == "rebase":
        _require_full_precision(base, "Rebase needs the full-precision weights the adapter was trained on")
        return Choice(variant, OutputFormat(None, quantization), None, is_measurable=True, reason=reason)
    if quantization is None:
        _require_full_precision(base, "Without quantization the base is served in full precision")
        output_format = None if base.artifact else OutputFormat(None, None)
        return Choice(variant, output_format, None, is_measurable=True, reason=reason)
    if base.is_quantized:
        reason = _sentence(
            variant.reason, "what that costs was not measured, since the full-precision weights were not given"
        )
        output_format = None if base.artifact else OutputFormat(None, base.quantization_format)
        return Choice(variant, output_format, None, is_measurable=False, reason=reason)
    return Choice(variant, OutputFormat(None, quantization), None, is_measurable=True, reason=reason)


def _require_full_precision(base: BaseModel, why: str) -> None:
    if base.is_quantized:
        raise BaseMismatch(
            f"{why}; {base.root} holds only a rounded form of them ({base.quantization_name}). Give the original model "
            "directory with --base."
        )


def _sentence(*parts: str) -> str:
    text = "; ".join(part for part in parts if part)
    return f"{text[0].upper()}{text[1:]}."
