"""Settings of adapter_config.json: which ones no route supports, and which ones don't change the adapter's function.

Source: peft 0.21 `LoraConfig`, and what ms-swift 2 to 4 adds to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from convert.artifact.json_files import shown


@dataclass(frozen=True)
class Setting:
    """A key of adapter_config.json that no route supports unless its value is neutral; `why` says what to do."""

    neutral: tuple[object, ...]
    why: str


_OFF: tuple[object, ...] = (None, False)
_UNSUPPORTED_SETTINGS: Mapping[str, Setting] = {
    "lora_bias": Setting(_OFF, "a bias in LoRA is not served: train with lora_bias=False"),
    "target_parameters": Setting((None, []), "LoRA on bare parameters is not served: use target_modules"),
    "layer_replication": Setting((None, []), "replicated layers are another model: train without them"),
    "fan_in_fan_out": Setting(_OFF, "weights stored transposed (GPT-2) are not supported"),
    "alora_invocation_tokens": Setting((None, []), "aLoRA is not supported: train plain LoRA"),
    "use_qalora": Setting(_OFF, "QALoRA is not supported: train plain LoRA"),
    "use_qa_lora": Setting(_OFF, "QALoRA is not supported: train plain LoRA"),
    "use_bdlora": Setting(_OFF, "block-diagonal LoRA is not supported: train plain LoRA"),
    "use_merged_linear": Setting(_OFF, "LoRA on parts of a fused layer is not supported: target the single layers"),
    "enable_lora": Setting((None, []), "LoRA on parts of a fused layer is not supported: target the single layers"),
    "arrow_config": Setting(_OFF, "Arrow routing is not supported: convert the single adapters"),
    "kasa_config": Setting(_OFF, "KaSA is not supported: train plain LoRA"),
    "monteclora_config": Setting(_OFF, "MonteCLoRA is not supported: train plain LoRA"),
}

# Settings of training, or of how PEFT finds the modules to adapt: the tensors show which ones it found.
_HARMLESS_SETTINGS = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "group_size",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "lora_dtype",
        "lora_ga_config",
        "lorap_emb_lr",
        "lorap_lr_ratio",
        "megatron_config",
        "megatron_core",
        "model_key_mapping",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "swift_type",
        "target_modules",
        "task_type",
        "trainable_token_indices",
        "use_dora",
        "use_rslora",
        "velora_config",
    }
)

# Settings that name modules. PEFT doesn't check their types, and fails where it uses them.
_NAMES = "expected the name of a module, a list of names, or null"
_LIST_OF_NAMES = "expected a list of names of modules, or null"
_NAME_SETTINGS: Mapping[str, str] = {
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "layers_pattern": _NAMES,
    "modules_to_save": _LIST_OF_NAMES,
}


def _type_problem(name: str, value: object) -> str | None:
    """What is wrong with the type of a setting that names modules."""
    expected = _NAME_SETTINGS.get(name)
    if expected is None or value is None or (isinstance(value, str) and expected is _NAMES):
        return None
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return None
    return f"{name}={shown(value)}: {expected}, as PEFT's save_pretrained writes it"


_BIASES = (None, "none", "all", "lora_only")
_NEUTRAL: tuple[object, ...] = (None, False, [], {}, "")
# Initialisations that leave the base weights alone. The others (pissa, olora, corda, loftq, lora_ga) change the base
# weights before training, so that the adapter is wrong on the published base.
_PLAIN_INITS: tuple[object, ...] = (None, True, False, "gaussian", "eva", "mica", "orthogonal")


def setting_problems(config: Mapping[str, Any]) -> list[str]:
    """What stops a conversion in the settings of adapter_config.json."""
    problems = []
    if str(config.get("peft_type", "")).upper() != "LORA":
        problems.append(f"peft_type is {config.get('peft_type')!r}: only LORA adapters are supported")
    problems += [problem for name, value in config.items() if (problem := _setting_problem(name, value))]
    return problems


def _setting_problem(name: str, value: object) -> str | None:
    if setting := _UNSUPPORTED_SETTINGS.get(name):
        return None if value in setting.neutral else f"{name}={value!r}: {setting.why}"
    if name == "bias":
        return None if value in _BIASES else f"bias={value!r}: expected one of {', '.join(map(repr, _BIASES))}"
    if name == "init_lora_weights":
        if value in _PLAIN_INITS:
            return None
        return (
            f"init_lora_weights={value!r} changed the base weights before training, so the adapter alone is wrong "
            "on the original base: save it converted to plain LoRA (PEFT: path_initial_model_for_weight_conversion)"
        )
    if problem := _type_problem(name, value):
        return problem
    if name in _HARMLESS_SETTINGS or value in _NEUTRAL:
        return None
    return f"{name}={value!r} is a setting not known here: it may change what the adapter does"
