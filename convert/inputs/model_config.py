"""Settings of a model's config.json; where the file leaves one out, transformers' default for the model type."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from convert.artifact.file_names import CONFIG
from convert.artifact.json_files import Settings, read_json, settings_of
from convert.errors import BaseUnreadable

_Size = Annotated[int, Field(gt=0, le=1 << 31)]
_Number = Annotated[float, Field(allow_inf_nan=False)]
# Vocabularies have less than 2^31 tokens, and the tokenizers library takes no larger ids.
_TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
TEXT_CONFIG = "text_config"
StopIds = _TokenId | list[_TokenId] | None


class ModelSettings(Settings):
    """What is read of config.json, by Graft and by transformers' Llama and its relatives."""

    model_type: Annotated[str, Field(min_length=1)]
    num_hidden_layers: Annotated[int, Field(gt=0, le=10_000)]
    hidden_size: _Size | None = None
    intermediate_size: _Size | None = None
    num_attention_heads: _Size | None = None
    num_key_value_heads: _Size | None = None
    head_dim: _Size | None = None
    vocab_size: _Size | None = None
    max_position_embeddings: _Size | None = None
    hidden_act: str | None = None
    rms_norm_eps: _Number | None = None
    rope_theta: _Number | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    tie_word_embeddings: bool | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    quantization_config: dict[str, Any] | None = None
    text_config: dict[str, Any] | None = None
    eos_token_id: StopIds = None


def read_config(directory: Path) -> dict[str, Any]:
    """The config.json of a model directory. Raises BaseUnreadable, which names every setting of a wrong type."""
    path = directory / CONFIG
    config = read_json(path, BaseUnreadable)
    nested = config.get(TEXT_CONFIG)
    stated = {**config, **nested, "model_type": config.get("model_type")} if isinstance(nested, dict) else config
    settings_of(stated, ModelSettings, path, BaseUnreadable)
    return config


def language_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the language model: those of the whole model, or the `text_config` of a multimodal one."""
    nested = config.get(TEXT_CONFIG)
    if not isinstance(nested, dict):
        return config
    model_type = nested.get("model_type") or getattr(_language_defaults(config), "model_type", None)
    return {**config, **nested, "model_type": model_type or config["model_type"]}


def with_language_settings(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with these settings of the language model."""
    nested = config.get(TEXT_CONFIG)
    return {**config, TEXT_CONFIG: {**nested, **changes}} if isinstance(nested, dict) else {**config, **changes}


def stop_ids(stated: StopIds) -> tuple[int, ...]:
    """The token ids of an `eos_token_id`, each once."""
    return () if stated is None else tuple(dict.fromkeys(stated if isinstance(stated, list) else [stated]))


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The configuration with torch's name of the weights' type, under both of its names.

    Readers older than transformers 4.56 know only torch_dtype.
    """
    names = ("dtype", "torch_dtype")
    nested = config.get(TEXT_CONFIG)
    stated = [name for name in names if isinstance(nested, dict) and nested.get(name)]
    return with_language_settings(config, dict.fromkeys(stated, dtype)) | dict.fromkeys(names, dtype)


def setting(config: Mapping[str, Any], name: str) -> Any:
    """The value in config.json, else transformers' default; None where transformers doesn't know the model type."""
    if name in config:
        return config[name]
    defaults = _defaults(str(config.get("model_type")))
    return getattr(defaults, name, getattr(_language_defaults(config), name, None))


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the head is the embedding."""
    return bool(setting(config, "tie_word_embeddings"))


def with_own_head(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a model whose head has its own weight. vLLM reads the setting of the language model."""
    return with_language_settings(config, {"tie_word_embeddings": False}) | {"tie_word_embeddings": False}


def head_dim(config: Mapping[str, Any]) -> int | None:
    """The size of an attention head, None where the settings are no valid numbers.

    As in transformers' Llama: `head_dim`, or hidden_size / num_attention_heads where it is missing or null.
    """
    size = config.get("head_dim")
    if size is None:
        hidden, heads = setting(config, "hidden_size"), setting(config, "num_attention_heads")
        size = hidden // heads if type(hidden) is int and type(heads) is int and heads > 0 else None
    return size if type(size) is int and size > 0 else None


def rope_note(config: Mapping[str, Any]) -> str:
    """A sentence where the settings of the rotary embedding contradict each other; empty where they don't.

    transformers before 5 reads rope_theta and rope_scaling, later ones rope_parameters, and each ignores the others.
    """
    given = {name: config[name] for name in ("rope_theta", "rope_scaling", "rope_parameters") if config.get(name)}
    objects = [value for value in given.values() if isinstance(value, dict)]
    thetas = [given.get("rope_theta"), *(value.get("rope_theta") for value in objects)]
    is_conflict = len({repr(theta) for theta in thetas if theta is not None}) > 1 or (
        len(objects) == 2 and _without_theta(objects[0]) != _without_theta(objects[1])
    )
    if not is_conflict:
        return ""
    stated = ", ".join(f"{name}={value!r}" for name, value in given.items())
    return (
        f"{CONFIG} contradicts itself about the rotary embedding: {stated}. Everything was measured with "
        f"{_rope_of_transformers(config)}, which transformers takes from it; another engine may take the other values."
    )


def _without_theta(parameters: Mapping[str, Any]) -> dict[str, Any]:
    names = {"type": "rope_type"}
    return {names.get(name, name): value for name, value in parameters.items() if name != "rope_theta"}


def _rope_of_transformers(config: Mapping[str, Any]) -> object:
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**dict(config)).rope_parameters
    except Exception:  # as in _defaults
        return "the values"


def _language_defaults(config: Mapping[str, Any]) -> Any:
    return getattr(_defaults(str(config.get("model_type"))), TEXT_CONFIG, None)


@cache
def _defaults(model_type: str) -> Any:
    """transformers' configuration of a model type with nothing set; None for an unknown type.

    It is made from transformers' own classes: no file is read, and no code of a model is run.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(model_type)
    except Exception:  # ValueError for an unknown type; types without defaults raise errors of many kinds
        return None
