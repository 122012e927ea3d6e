"""The files that say how an adapter was trained: one function for each kind of file that trainers leave.

TRAINER_FILE_SOURCES read a directory of the training run, BASE_SOURCES read what the checkpoint says about its base.
Each function returns None where its file is missing or says nothing. `detect` weighs the answers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from convert.artifact.file_names import CONFIG
from convert.detection.training import Training, TrainingQuantizer, TrainingSource
from convert.inputs import trainer_files
from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.trainer_files import public_name

# Each takes a time that grows with the text alone, whatever somebody else wrote there: none begins anew in what it has
# passed over.
_CARD_BLOCK = re.compile(
    r"The following `bitsandbytes` quantization config was used during training:[^\S\n]*\n(?P<lines>(?:\s*- .*\n?)+)"
)
_AXOLOTL_BLOCK = re.compile(r"^```ya?ml\n(?P<lines>(?:(?!```).*\n)*)```", re.MULTILINE)
_TORCHTUNE_MODEL = re.compile(
    r"^[^\S\n]*_component_:[^\S\n]*torchtune\.models\.[\w.]*?\b(?P<builder>q?lora_\w+)", re.MULTILINE
)
_TORCHTUNE_QUANTIZED = re.compile(r"^[^\S\n]*quantize_base:[^\S\n]*true\b", re.MULTILINE | re.IGNORECASE)
# axolotl's own is the first; reading YAML is slow.
_MOST_BLOCKS = 4
_FOUR_BIT_NAME = re.compile(r"[-_](?:bnb[-_]4bit|nf4)$", re.IGNORECASE)
_PARTIAL_NAME = re.compile(r"-unsloth-bnb-4bit$", re.IGNORECASE)
_OTHER_QUANTIZED_NAME = re.compile(
    r"[-_](?P<kind>gptq|awq|bnb[-_]8bit|fp8|int8|int4|w4a16|w8a8|mxfp4|nvfp4|hqq|gguf|[2348]bit)\b", re.IGNORECASE
)


def _from_swift(directory: Path) -> TrainingSource | None:
    """ms-swift 3 and 4: quant_method and quant_bits, null where nothing was quantized."""
    arguments = trainer_files.read_json_object(directory / "args.json")
    if not {"quant_method", "quant_bits"} & arguments.keys():
        return None
    method, bits = arguments.get("quant_method"), arguments.get("quant_bits")
    if not method and not bits:
        return TrainingSource(Training.LORA, "args.json: quant_method and quant_bits are null")
    return _swift_source(f"args.json: quant_method={method}, quant_bits={bits}", method, bits, arguments)


def _from_old_swift(directory: Path) -> TrainingSource | None:
    """ms-swift 2: quantization_bit, 0 where nothing was quantized while loading."""
    arguments = trainer_files.read_json_object(directory / "sft_args.json")
    if "quantization_bit" not in arguments:
        return None
    bits, method = arguments["quantization_bit"], arguments.get("quant_method")
    if not bits and not method:
        return TrainingSource(Training.LORA, f"sft_args.json: quantization_bit={bits}")
    return _swift_source(f"sft_args.json: quant_method={method}, quantization_bit={bits}", method, bits, arguments)


def _swift_source(sentence: str, method: object, bits: object, arguments: Mapping[str, Any]) -> TrainingSource:
    if method not in (None, "bnb", "bitsandbytes"):
        return TrainingSource(Training.QLORA, sentence, TrainingQuantizer(str(method)))
    kind = arguments.get("bnb_4bit_quant_type") or "nf4"
    return TrainingSource(Training.QLORA, sentence, _quantizer(bits, kind, arguments.get("bnb_4bit_use_double_quant")))


def _from_saved_config(directory: Path) -> TrainingSource | None:
    """config.json of the loaded model, which axolotl and others write beside the adapter."""
    quantization = trainer_files.read_json_object(directory / CONFIG).get("quantization_config")
    if not isinstance(quantization, dict):
        return None
    source = _from_settings(quantization, f"{CONFIG} beside the adapter: quantization_config")
    # A model that was not quantized when this file was saved may still have been quantized in training.
    return source if source and source.training is Training.QLORA else None


def _from_torchtune(directory: Path) -> TrainingSource | None:
    """The recipe's configuration, which its loggers save in the run's directory."""
    recipe = trainer_files.read_text(directory / "torchtune_config.yaml")
    builder = _TORCHTUNE_MODEL.search(recipe)
    if not builder:
        return None
    sentence = f"torchtune_config.yaml: {builder['builder']}"
    if builder["builder"].startswith("qlora_") or _TORCHTUNE_QUANTIZED.search(recipe):
        return TrainingSource(Training.QLORA, f"{sentence}, quantized by torchao", TrainingQuantizer("nf4-torchao"))
    return TrainingSource(Training.LORA, sentence)


def _from_base_config(checkpoint: Checkpoint) -> TrainingSource | None:
    """config.json of the base that the adapter names, where that is a directory of this machine."""
    path = Path(checkpoint.base_name or "") / CONFIG
    # os.path: False for a name that is no path at all, where pathlib raises an error.
    if not checkpoint.base_name or not os.path.isfile(path):  # noqa: PTH113
        return None
    quantization = trainer_files.read_json_object(path).get("quantization_config")
    if not isinstance(quantization, dict):
        return None
    name = public_name(checkpoint.base_name)
    return _from_settings(quantization, f"{CONFIG} of its base {name}: quantization_config")


def _from_base_name(checkpoint: Checkpoint) -> TrainingSource | None:
    """The name of the base, where it ends in the name of a quantizer. A plain name says nothing."""
    name = public_name(checkpoint.base_name or "")
    if _FOUR_BIT_NAME.search(name):
        partial = bool(_PARTIAL_NAME.search(name))
        return TrainingSource(Training.QLORA, f"its base is named {name}", TrainingQuantizer(partial=partial))
    if match := _OTHER_QUANTIZED_NAME.search(name):
        return TrainingSource(Training.QLORA, f"its base is named {name}", TrainingQuantizer(match["kind"].lower()))
    return None


def _from_model_card(directory: Path) -> TrainingSource | None:
    """The block that PEFT writes into README.md."""
    block = _CARD_BLOCK.search(trainer_files.model_card(directory))
    if not block:
        return None
    return _from_settings(trainer_files.yaml_scalars(block["lines"]), "README.md: quantization config of PEFT")


def _from_axolotl(directory: Path) -> TrainingSource | None:
    """The YAML that axolotl writes into README.md."""
    for block in islice(_AXOLOTL_BLOCK.finditer(trainer_files.model_card(directory)), _MOST_BLOCKS):
        settings = trainer_files.yaml_scalars(block["lines"])
        if settings.get("adapter") == "qlora" or settings.keys() & {"load_in_4bit", "load_in_8bit"}:
            settings.setdefault("load_in_4bit", settings.get("adapter") == "qlora")
            return _from_settings(settings, "README.md: axolotl configuration")
    return None


def _from_llama_factory(directory: Path) -> TrainingSource | None:
    """The arguments that LLaMA-Factory saves with the run."""
    settings = trainer_files.yaml_scalars(trainer_files.read_text(directory / "training_args.yaml"))
    return _llama_factory_source(settings, "", "training_args.yaml")


def _from_llama_board(directory: Path) -> TrainingSource | None:
    """The state of LLaMA-Factory's web page when the run was started."""
    settings = trainer_files.yaml_scalars(trainer_files.read_text(directory / "llamaboard_config.yaml"))
    return _llama_factory_source(settings, "top.", "llamaboard_config.yaml")


def _llama_factory_source(settings: Mapping[str, Any], prefix: str, file: str) -> TrainingSource | None:
    if f"{prefix}quantization_bit" not in settings:
        return None
    bits, method = settings[f"{prefix}quantization_bit"], settings.get(f"{prefix}quantization_method") or "bnb"
    if not bits:
        return TrainingSource(Training.LORA, f"{file}: {prefix}quantization_bit is null")
    sentence = f"{file}: {prefix}quantization_bit={bits}"
    if method not in ("bnb", "bitsandbytes"):
        return TrainingSource(
            Training.QLORA, f"{sentence}, {prefix}quantization_method={method}", TrainingQuantizer(str(method))
        )
    # LLaMA-Factory's own defaults: nf4, double quantization on.
    kind, double = settings.get("quantization_type") or "nf4", settings.get("double_quantization", True)
    return TrainingSource(Training.QLORA, sentence, _quantizer(bits, kind, double))


def _from_settings(settings: Mapping[str, Any], where: str) -> TrainingSource | None:
    """The keys of BitsAndBytesConfig, or the `quant_method` of another quantizer."""
    method = settings.get("quant_method") or "bitsandbytes"
    if method != "bitsandbytes":
        return TrainingSource(Training.QLORA, f"{where}: quant_method={method}", TrainingQuantizer(str(method)))
    if settings.get("load_in_4bit"):
        kind = settings.get("bnb_4bit_quant_type") or "nf4"
        double = settings.get("bnb_4bit_use_double_quant")
        return TrainingSource(Training.QLORA, f"{where}: load_in_4bit, {kind}", _quantizer(4, kind, double))
    if settings.get("load_in_8bit"):
        return TrainingSource(Training.QLORA, f"{where}: load_in_8bit", TrainingQuantizer("8-bit"))
    if "load_in_4bit" in settings:
        return TrainingSource(Training.LORA, f"{where}: load_in_4bit is false")
    return None


def _quantizer(bits: object, kind: object, double: object) -> TrainingQuantizer:
    if str(bits or 4) != "4":
        return TrainingQuantizer(f"{bits}-bit")
    return TrainingQuantizer(str(kind), None if double is None else bool(double))


TRAINER_FILE_SOURCES: tuple[Callable[[Path], TrainingSource | None], ...] = (
    _from_swift,
    _from_old_swift,
    _from_axolotl,
    _from_llama_factory,
    _from_llama_board,
    _from_torchtune,
    _from_model_card,
    _from_saved_config,
)
BASE_SOURCES: tuple[Callable[[Checkpoint], TrainingSource | None], ...] = (_from_base_config, _from_base_name)
