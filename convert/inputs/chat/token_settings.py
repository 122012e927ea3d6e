"""The settings of a tokenizer's files that are read here, with their types, and the stop tokens that they name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from convert.artifact.file_names import CONFIG, GENERATION_CONFIG, SPECIAL_TOKENS, TOKENIZER_CONFIG
from convert.artifact.json_files import Settings, read_json, settings_of
from convert.errors import BaseUnreadable
from convert.inputs.model_config import StopIds, stop_ids

# A token as text, or with its settings as the tokenizers library writes them.
_Token = str | dict[str, Any] | None
_Side = Literal["left", "right"] | None


class _SpecialTokens(Settings):
    bos_token: _Token = None
    eos_token: _Token = None
    pad_token: _Token = None
    unk_token: _Token = None


class _TokenizerSettings(_SpecialTokens):
    # transformers writes 1e30 for a tokenizer without a limit.
    model_max_length: int | float | None = None
    tokenizer_class: str | None = None
    padding_side: _Side = None
    truncation_side: _Side = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None


class _StopSettings(Settings):
    eos_token_id: StopIds = None


_KINDS: Mapping[str, type[Settings]] = {
    TOKENIZER_CONFIG: _TokenizerSettings,
    SPECIAL_TOKENS: _SpecialTokens,
    GENERATION_CONFIG: _StopSettings,
    CONFIG: _StopSettings,
}


def stated_stop_ids(directory: Path, sources: Mapping[str, Path]) -> tuple[int, ...]:
    """The stop tokens by generation_config.json, else config.json; () where neither names one.

    Raises BaseUnreadable for a setting of a wrong type in these or in the tokenizer's files. `sources` as in
    `Tokenizer.open`.
    """
    settings = {name: _settings(sources.get(name, directory / name)) for name in _KINDS}
    stated = (stop_ids(each.eos_token_id) for each in settings.values() if isinstance(each, _StopSettings))
    return next(filter(None, stated), ())


def token_id(value: object) -> tuple[int, ...]:
    """The id of a special token of a loaded tokenizer; () where it has none."""
    return (value,) if type(value) is int else ()


def _settings(path: Path) -> Settings | None:
    if not path.exists():
        return None
    return settings_of(read_json(path, BaseUnreadable), _KINDS[path.name], path, BaseUnreadable)
