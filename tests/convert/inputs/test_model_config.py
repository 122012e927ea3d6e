"""Settings that a config.json leaves out have transformers' defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from convert.inputs.base_model import BaseModel
from convert.inputs.model_config import head_dim, is_tied, rope_note, setting
from tests.convert import parts


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"model_type": "llama"}, False),
        ({"model_type": "gemma"}, True),
        ({"model_type": "gemma", "tie_word_embeddings": False}, False),
        ({"model_type": "of nobody"}, False),
        ({"model_type": "of nobody", "tie_word_embeddings": True}, True),
    ],
)
def test_whether_the_head_is_tied(config: dict[str, Any], tied: bool) -> None:
    assert is_tied(config) is tied


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"model_type": "llama", "head_dim": 96, "hidden_size": 64, "num_attention_heads": 4}, 96),
        ({"model_type": "llama", "head_dim": None, "hidden_size": 64, "num_attention_heads": 4}, 16),
        ({"model_type": "llama", "hidden_size": 64}, 2),  # Llama has 32 heads by default
        ({"model_type": "of nobody", "hidden_size": 64}, None),
        ({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 0}, None),
        ({"model_type": "llama", "hidden_size": "64", "num_attention_heads": 4}, None),
        ({"model_type": "llama", "head_dim": "16"}, None),
    ],
)
def test_the_size_of_a_head(config: dict[str, Any], size: int | None) -> None:
    assert head_dim(config) == size


def test_an_unknown_setting_has_no_default() -> None:
    assert setting({"model_type": "llama"}, "no_such_setting") is None


def test_a_base_without_the_setting_has_the_head_of_its_model_type(untied_base: Path, tmp_path: Path) -> None:
    copied = parts.copy(untied_base, tmp_path / "copy")
    parts.edit_json(copied / "config.json", tie_word_embeddings=...)

    assert BaseModel.open(copied).is_tied is False


@pytest.mark.parametrize(
    ("settings", "taken"),
    [
        ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "500000.0"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}}, "linear"),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, ""),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}}, ""),
        ({"rope_theta": 1e4, "rope_scaling": None}, ""),
        ({}, ""),
    ],
)
def test_contradicting_settings_of_the_rotary_embedding_are_noted(settings: dict[str, Any], taken: str) -> None:
    note = rope_note({"model_type": "llama", **settings})

    assert bool(note) is bool(taken)
    assert taken in note.partition("measured with")[2]
