"""The single things that speak for one answer to how an adapter was trained. `detect` weighs them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from convert import notes
from convert.base_model import CONFIG, public_name
from convert.checkpoint import Checkpoint
from convert.errors import CheckpointUnreadable
from convert.tensors import read_json

STAMP = "graft_training.json"
STAMP_SCHEMA = "graft.training/1"

_CARD_BLOCK = re.compile(
    r"The following `bitsandbytes` quantization config was used during training:\s*\n(?P<lines>(?:\s*- .*\n?)+)"
)
_AXOLOTL_BLOCK = re.compile(r"```ya?ml\n(?P<lines>.*?)\n```", re.DOTALL)
_TORCHTUNE_MODEL = re.compile(r"^\s*_component_:\s*torchtune\.models\.[\w.]*?\b(?P<builder>q?lora_\w+)", re.MULTILINE)
_TORCHTUNE_QUANTIZED = re.compile(r"^\s*quantize_base:\s*true\b", re.MULTILINE | re.IGNORECASE)
_FOUR_BIT_NAME = re.compile(r"[-_](?:bnb[-_]4bit|nf4)$", re.IGNORECASE)
_PARTIAL_NAME = re.compile(r"-unsloth-bnb-4bit$", re.IGNORECASE)
_OTHER_QUANTIZED_NAME = re.compile(
    r"[-_](?P<kind>gptq|awq|bnb[-_]8bit|fp8|int8|int4|w4a16|w8a8|mxfp4|nvfp4|hqq|gguf|[2348]bit)\b", re.IGNORECASE
)


class Training(Enum):
    LORA = "lora"
    QLORA = "qlora"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Quantizer:
    """How the weights were quantized in training. `double` is None where nothing says it.

    `partial`: some linear layers were left in 16 bits, and only the base itself says which.
    """

    kind: str = "nf4"
    double: bool | None = None
    partial: bool = False


@dataclass(frozen=True)
class Evidence:
    """One thing that speaks for one answer."""

    says: Training
    line: str
    quantizer: Quantizer | None = None


def stamp(training: Training, quantizer: Quantizer | None = None) -> dict[str, Any]:
    """The content of a stamp that says it."""
    told_quantizer = {"kind": quantizer.kind, "double": quantizer.double} if quantizer else None
    trained_on = "4bit" if training is Training.QLORA else "full"
    return {"schema": STAMP_SCHEMA, "trained_on": trained_on, "quantizer": told_quantizer}


def from_stamp(checkpoint: Checkpoint) -> Evidence | None:
    path = checkpoint.root / STAMP
    if not path.is_file():
        return None
    content = read_json(path, CheckpointUnreadable)
    trained_on, quantizer = content.get("trained_on"), content.get("quantizer")
    known = content.get("schema") == STAMP_SCHEMA and trained_on in ("4bit", "full")
    settings = quantizer if isinstance(quantizer, dict) else {}
    kind, double = settings.get("kind", "nf4"), settings.get("double")
    fits = quantizer is None or (trained_on == "4bit" and isinstance(quantizer, dict))
    if not known or not fits or not isinstance(kind, str) or not isinstance(double, bool | None):
        raise CheckpointUnreadable(
            f'{path} is no stamp: expected {{"schema": "{STAMP_SCHEMA}", "trained_on": "4bit" or "full", '
            '"quantizer": {"kind": "nf4", "double": true} or null}. Correct it, or remove it.'
        )
    line = f"{STAMP}: trained_on={trained_on}"
    if trained_on == "full":
        return Evidence(Training.LORA, line)
    return Evidence(Training.QLORA, f"{line}, {kind}", Quantizer(kind, double))


def _from_swift(place: Path) -> Evidence | None:
    arguments = notes.document(place / "args.json")
    if not {"quant_method", "quant_bits"} & arguments.keys():
        return None
    method, bits = arguments.get("quant_method"), arguments.get("quant_bits")
    if not method and not bits:
        return Evidence(Training.LORA, "args.json: quant_method and quant_bits are null")
    return _swift_evidence("args.json: quant_method={}, quant_bits={}", method, bits, arguments)


def _from_old_swift(place: Path) -> Evidence | None:
    """ms-swift 2: quantization_bit, 0 where nothing was quantized while loading."""
    arguments = notes.document(place / "sft_args.json")
    if "quantization_bit" not in arguments:
        return None
    bits, method = arguments["quantization_bit"], arguments.get("quant_method")
    if not bits and not method:
        return Evidence(Training.LORA, f"sft_args.json: quantization_bit={bits}")
    return _swift_evidence("sft_args.json: quant_method={}, quantization_bit={}", method, bits, arguments)


def _swift_evidence(line: str, method: object, bits: object, arguments: Mapping[str, Any]) -> Evidence:
    line = line.format(method, bits)
    if method not in (None, "bnb", "bitsandbytes"):
        return Evidence(Training.QLORA, line, Quantizer(str(method)))
    kind = arguments.get("bnb_4bit_quant_type") or "nf4"
    return Evidence(Training.QLORA, line, _quantizer(bits, kind, arguments.get("bnb_4bit_use_double_quant")))


def _from_saved_config(place: Path) -> Evidence | None:
    """config.json of the model, which axolotl and others copy beside the adapter as it was loaded."""
    quantization = notes.document(place / CONFIG).get("quantization_config")
    if not isinstance(quantization, dict):
        return None
    found = _from_settings(quantization, f"{CONFIG} beside the adapter: quantization_config")
    # What was not quantized while this config was saved may have been while it was trained.
    return found if found and found.says is Training.QLORA else None


def _from_torchtune(place: Path) -> Evidence | None:
    """The recipe's configuration, which its loggers save in the run's directory."""
    recipe = notes.text(place / "torchtune_config.yaml")
    builder = _TORCHTUNE_MODEL.search(recipe)
    if not builder:
        return None
    line = f"torchtune_config.yaml: {builder['builder']}"
    if builder["builder"].startswith("qlora_") or _TORCHTUNE_QUANTIZED.search(recipe):
        return Evidence(Training.QLORA, f"{line}, quantized by torchao", Quantizer("nf4-torchao"))
    return Evidence(Training.LORA, line)


def _from_base_config(checkpoint: Checkpoint) -> Evidence | None:
    """The base that the adapter names, where it is a directory on this machine."""
    if not checkpoint.base_name or not (path := Path(checkpoint.base_name) / CONFIG).is_file():
        return None
    quantization = notes.document(path).get("quantization_config")
    if not isinstance(quantization, dict):
        return None
    name = public_name(checkpoint.base_name)
    return _from_settings(quantization, f"{CONFIG} of its base {name}: quantization_config")


def _from_base_name(checkpoint: Checkpoint) -> Evidence | None:
    name = public_name(checkpoint.base_name or "")
    if _FOUR_BIT_NAME.search(name):
        partial = bool(_PARTIAL_NAME.search(name))
        return Evidence(Training.QLORA, f"its base is named {name}", Quantizer(partial=partial))
    if other := _OTHER_QUANTIZED_NAME.search(name):
        return Evidence(Training.QLORA, f"its base is named {name}", Quantizer(other["kind"].lower()))
    return None


def _from_model_card(place: Path) -> Evidence | None:
    """The block that PEFT writes into README.md."""
    block = _CARD_BLOCK.search(notes.model_card(place))
    return _from_settings(notes.scalars(block["lines"]), "README.md: quantization config of PEFT") if block else None


def _from_axolotl(place: Path) -> Evidence | None:
    """The YAML that axolotl writes into README.md."""
    for block in _AXOLOTL_BLOCK.finditer(notes.model_card(place)):
        settings = notes.scalars(block["lines"])
        if settings.get("adapter") == "qlora" or settings.keys() & {"load_in_4bit", "load_in_8bit"}:
            settings.setdefault("load_in_4bit", settings.get("adapter") == "qlora")
            return _from_settings(settings, "README.md: axolotl configuration")
    return None


def _from_llama_factory(place: Path) -> Evidence | None:
    return _llama_factory_evidence(notes.scalars(notes.text(place / "training_args.yaml")), "", "training_args.yaml")


def _from_llama_board(place: Path) -> Evidence | None:
    """The state of LLaMA-Factory's web page when the run was started."""
    settings = notes.scalars(notes.text(place / "llamaboard_config.yaml"))
    return _llama_factory_evidence(settings, "top.", "llamaboard_config.yaml")


def _llama_factory_evidence(settings: Mapping[str, Any], prefix: str, file: str) -> Evidence | None:
    if f"{prefix}quantization_bit" not in settings:
        return None
    bits, method = settings[f"{prefix}quantization_bit"], settings.get(f"{prefix}quantization_method") or "bnb"
    if not bits:
        return Evidence(Training.LORA, f"{file}: {prefix}quantization_bit is null")
    line = f"{file}: {prefix}quantization_bit={bits}"
    if method not in ("bnb", "bitsandbytes"):
        return Evidence(Training.QLORA, f"{line}, {prefix}quantization_method={method}", Quantizer(str(method)))
    # LLaMA-Factory's own defaults: nf4, double quantization on.
    kind, double = settings.get("quantization_type") or "nf4", settings.get("double_quantization", True)
    return Evidence(Training.QLORA, line, _quantizer(bits, kind, double))


NOTE_LOOKS: tuple[Callable[[Path], Evidence | None], ...] = (
    _from_swift,
    _from_old_swift,
    _from_axolotl,
    _from_llama_factory,
    _from_llama_board,
    _from_torchtune,
    _from_model_card,
    _from_saved_config,
)
BASE_LOOKS: tuple[Callable[[Checkpoint], Evidence | None], ...] = (_from_base_config, _from_base_name)


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
