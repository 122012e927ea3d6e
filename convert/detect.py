"""Was the adapter trained on full-precision weights (LoRA) or on 4-bit weights (QLoRA)?

It decides everything that follows and the adapter's own files don't say it: only what trainers leave beside them
does. A plain base name proves nothing, since QLoRA usually quantizes while loading; so without evidence, or with
evidence that contradicts itself, the answer is UNKNOWN. training_args.bin is a pickle and is never opened.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from convert.base_model import CONFIG, public_name
from convert.checkpoint import Checkpoint
from convert.errors import CheckpointUnreadable, CheckpointUnsupported, ConvertError, TrainingUnknown
from convert.formats import model_card
from convert.tensors import read_json

_CARD_BLOCK = re.compile(
    r"The following `bitsandbytes` quantization config was used during training:\s*\n(?P<lines>(?:\s*- .*\n?)+)"
)
_AXOLOTL_BLOCK = re.compile(r"```ya?ml\n(?P<lines>.*?)\n```", re.DOTALL)
_YAML_SCALAR = re.compile(r"^(?:- )?(\w+):[ \t]*([^\s#]+)", re.MULTILINE)
_FOUR_BIT_NAME = re.compile(r"[-_](?:bnb[-_]4bit|nf4)$", re.IGNORECASE)
_OTHER_QUANTIZED_NAME = re.compile(r"[-_](?:gptq|awq|bnb[-_]8bit|fp8|int8|int4)\b", re.IGNORECASE)


class Training(Enum):
    LORA = "lora"
    QLORA = "qlora"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Quantizer:
    """How the weights were quantized in training. `double` is None where nothing says it."""

    kind: str = "nf4"
    double: bool | None = None


@dataclass(frozen=True)
class Evidence:
    """One thing that speaks for one answer."""

    says: Training
    line: str
    quantizer: Quantizer | None = None


@dataclass(frozen=True)
class Detection:
    """The answer and what it rests on."""

    training: Training
    lines: tuple[str, ...]
    quantizer: Quantizer | None

    def require_known(self, checkpoint: Path) -> Detection:
        """Raises TrainingUnknown, and CheckpointUnsupported for a quantizer other than NF4."""
        if self.training is Training.UNKNOWN:
            found = "".join(f"\n  - {line}" for line in self.lines)
            raise TrainingUnknown(
                f"Nothing certain says whether {checkpoint} is LoRA or QLoRA:{found}\n"
                "The two need different base weights. Say what the base was while training: --trained-on 4bit, "
                "if it was loaded with load_in_4bit (QLoRA), or --trained-on full (LoRA)."
            )
        if self.quantizer and self.quantizer.kind != "nf4":
            raise CheckpointUnsupported(
                f"{checkpoint} was trained on a base quantized to {self.quantizer.kind} ({'; '.join(self.lines)}). "
                "Only 4-bit NF4 of bitsandbytes can be reproduced so far: train on NF4 "
                "(bnb_4bit_quant_type='nf4') or on the full-precision model."
            )
        return self


def detect(checkpoint: Checkpoint) -> Detection:
    """Weigh everything the trainer left. Reads small text files only."""
    evidence = [found for look in _LOOKS if (found := look(checkpoint))]
    lines = tuple(one.line for one in evidence)
    answers = {one.says for one in evidence}
    if len(answers) != 1:
        return Detection(Training.UNKNOWN, lines or (_nothing(checkpoint),), None)
    quantizers = [one.quantizer for one in evidence if one.quantizer]
    kinds = {quantizer.kind for quantizer in quantizers}
    doubles = {quantizer.double for quantizer in quantizers} - {None}
    if len(kinds) > 1 or len(doubles) > 1:
        return Detection(Training.UNKNOWN, lines, None)
    quantizer = Quantizer(kinds.pop(), next(iter(doubles), None)) if kinds else None
    return Detection(answers.pop(), lines, quantizer)


def told(training: Training, found: Detection) -> Detection:
    """The user's word instead of the evidence; settings of the quantizer that were found stay."""
    word = "4-bit" if training is Training.QLORA else "full-precision"
    quantizer = (found.quantizer or Quantizer()) if training is Training.QLORA else None
    return Detection(training, (f"the user says it was trained on {word} weights",), quantizer)


def _nothing(checkpoint: Checkpoint) -> str:
    name = public_name(checkpoint.base_name) if checkpoint.base_name else "none"
    return f"no notes of a trainer; the base's name ({name}) proves nothing: it may have been quantized while loading"


def _from_swift(checkpoint: Checkpoint) -> Evidence | None:
    arguments = _document(checkpoint.root / "args.json")
    if not {"quant_method", "quant_bits"} & arguments.keys():
        return None
    method, bits = arguments.get("quant_method"), arguments.get("quant_bits")
    if not method and not bits:
        return Evidence(Training.LORA, "args.json: quant_method and quant_bits are null")
    line = f"args.json: quant_method={method}, quant_bits={bits}"
    if method not in (None, "bnb", "bitsandbytes"):
        return Evidence(Training.QLORA, line, Quantizer(str(method)))
    kind = arguments.get("bnb_4bit_quant_type") or "nf4"
    return Evidence(Training.QLORA, line, _quantizer(bits, kind, arguments.get("bnb_4bit_use_double_quant")))


def _from_base_config(checkpoint: Checkpoint) -> Evidence | None:
    """The base that the adapter names, where it is a directory on this machine."""
    if not checkpoint.base_name or not (path := Path(checkpoint.base_name) / CONFIG).is_file():
        return None
    quantization = _document(path).get("quantization_config")
    if not isinstance(quantization, dict):
        return None
    name = public_name(checkpoint.base_name)
    return _from_settings(quantization, f"{CONFIG} of its base {name}: quantization_config")


def _from_base_name(checkpoint: Checkpoint) -> Evidence | None:
    name = public_name(checkpoint.base_name or "")
    if _FOUR_BIT_NAME.search(name):
        return Evidence(Training.QLORA, f"its base is named {name}", Quantizer())
    if other := _OTHER_QUANTIZED_NAME.search(name):
        return Evidence(Training.QLORA, f"its base is named {name}", Quantizer(other[0].strip("-_").lower()))
    return None


def _from_model_card(checkpoint: Checkpoint) -> Evidence | None:
    """The block that older PEFT wrote into README.md."""
    block = _CARD_BLOCK.search(model_card(checkpoint.root))
    return _from_settings(_scalars(block["lines"]), "README.md: quantization config of PEFT") if block else None


def _from_axolotl(checkpoint: Checkpoint) -> Evidence | None:
    """The YAML that axolotl writes into README.md."""
    for block in _AXOLOTL_BLOCK.finditer(model_card(checkpoint.root)):
        settings = _scalars(block["lines"])
        if settings.get("adapter") == "qlora" or settings.keys() & {"load_in_4bit", "load_in_8bit"}:
            settings.setdefault("load_in_4bit", settings.get("adapter") == "qlora")
            return _from_settings(settings, "README.md: axolotl configuration")
    return None


def _from_llama_factory(checkpoint: Checkpoint) -> Evidence | None:
    try:
        text = (checkpoint.root / "training_args.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    settings = _scalars(text)
    if "quantization_bit" not in settings:
        return None
    bits, method = settings["quantization_bit"], settings.get("quantization_method") or "bnb"
    if not bits:
        return Evidence(Training.LORA, "training_args.yaml: quantization_bit is null")
    line = f"training_args.yaml: quantization_bit={bits}"
    if method not in ("bnb", "bitsandbytes"):
        return Evidence(Training.QLORA, f"{line}, quantization_method={method}", Quantizer(str(method)))
    # LLaMA-Factory's own defaults: nf4, double quantization on.
    kind, double = settings.get("quantization_type") or "nf4", settings.get("double_quantization", True)
    return Evidence(Training.QLORA, line, _quantizer(bits, kind, double))


_LOOKS: tuple[Callable[[Checkpoint], Evidence | None], ...] = (
    _from_swift,
    _from_axolotl,
    _from_llama_factory,
    _from_model_card,
    _from_base_config,
    _from_base_name,
)


def _from_settings(settings: Mapping[str, Any], where: str) -> Evidence | None:
    """BitsAndBytesConfig's own words, or another quantizer's `quant_method`."""
    method = settings.get("quant_method") or "bitsandbytes"
    if method != "bitsandbytes":
        return Evidence(Training.QLORA, f"{where}: quant_method={method}", Quantizer(str(method)))
    if settings.get("load_in_4bit"):
        kind = settings.get("bnb_4bit_quant_type") or "nf4"
        double = settings.get("bnb_4bit_use_double_quant")
        return Evidence(Training.QLORA, f"{where}: load_in_4bit, {kind}", _quantizer(4, kind, double))
    if settings.get("load_in_8bit"):
        return Evidence(Training.QLORA, f"{where}: load_in_8bit", Quantizer("8-bit"))
    if "load_in_4bit" in settings:
        return Evidence(Training.LORA, f"{where}: load_in_4bit is false")
    return None


def _quantizer(bits: object, kind: object, double: object) -> Quantizer:
    if str(bits or 4) != "4":
        return Quantizer(f"{bits}-bit")
    return Quantizer(str(kind), None if double is None else bool(double))


def _document(path: Path) -> dict[str, Any]:
    """A trainer's notes; broken notes are no evidence, and no reason to refuse the adapter beside them."""
    try:
        return read_json(path, CheckpointUnreadable)
    except ConvertError:
        return {}


_SCALARS: Mapping[str, Any] = {"true": True, "false": False, "null": None, "none": None, "~": None}


def _scalars(text: str) -> dict[str, Any]:
    """`name: value` lines of the outermost level. Enough for what is asked here, and no YAML parser to feed."""
    found = {}
    for name, value in _YAML_SCALAR.findall(text):
        plain = value.strip("\"'")
        found[name] = _SCALARS.get(plain.lower(), plain)
    return found
