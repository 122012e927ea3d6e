"""The table of families against transformers' own models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from convert.errors import ArchitectureUnknown
from convert.inputs.architecture import FAMILIES
from convert.inputs.base_model import BaseModel
from tests.convert import families, parts


def test_every_family_of_the_table_is_tested() -> None:
    assert families.FAMILIES.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_linear_layers_of_a_family_are_those_of_its_model(family: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = families.random_model(family, layers=2)
    architecture = FAMILIES[family]
    linears = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not architecture.is_other_part(name)
    }

    assert {*architecture.linears_of(2), architecture.head} == linears
    assert architecture.embedding in dict(model.named_parameters())
    assert model.get_input_embeddings() is model.get_submodule(architecture.embedding_module)
    assert model.get_output_embeddings() is model.get_submodule(architecture.head)
    others = dict(model.named_parameters()).keys() - {f"{name}.weight" for name in linears}
    assert [name for name in others if not architecture.has_other_weight(name)] == [
        name for name in others if architecture.is_other_part(name)
    ]
    if architecture.other_parts:
        parts_of_model = {f"model.{name}" for name, _ in model.model.named_children()}
        assert {*architecture.other_parts, "model.language_model"} == parts_of_model


def test_another_family_is_refused_by_its_name_although_its_weights_have_the_same(base: Path, tmp_path: Path) -> None:
    copied = parts.copy(base, tmp_path / "copy")
    parts.edit_json(copied / "config.json", model_type="doge")

    with pytest.raises(ArchitectureUnknown, match=r"family 'doge'.*llama, mistral.*add-an-architecture\.md"):
        BaseModel.open(copied)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("mllama", "attend to the image"),
        ("mixtral", "mixture of experts"),
        ("qwen2_moe", "mixture of experts"),
        ("qwen3_moe", "mixture of experts"),
        ("gpt_oss", "mixture of experts"),
    ],
)
def test_a_family_that_no_entry_can_describe_is_refused_with_the_reason(
    family: str, reason: str, base: Path, tmp_path: Path
) -> None:
    copied = parts.copy(base, tmp_path / "copy")
    parts.edit_json(copied / "config.json", model_type=family)

    with pytest.raises(ArchitectureUnknown, match=rf"'{family}' .*not converted.*{reason}"):
        BaseModel.open(copied)


def test_weights_of_another_family_are_refused(tmp_path: Path) -> None:
    from convert.errors import BaseUnreadable

    base = families.save_base("gemma2", tmp_path / "base")
    parts.edit_json(base / "config.json", model_type="llama")

    with pytest.raises(BaseUnreadable, match=r"not built like llama: 4 tensors .*post_feedforward_layernorm"):
        BaseModel.open(base)
