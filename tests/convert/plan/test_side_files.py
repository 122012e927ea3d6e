"""Tokenizer and chat templates of a written model, as transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from convert.errors import BaseUnreadable, CheckpointUnreadable
from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel
from convert.plan.conversion_plan import OutputFormat, plan_model
from convert.plan.side_files import differing_files
from convert.progress import silent
from convert.write.model import write_model
from tests.convert import parts

TOOLS = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"


def written(checkpoint: Path, base: Path, out: Path) -> Path:
    opened, opened_base = Checkpoint.open(checkpoint), BaseModel.open(base)
    out.mkdir()
    write_model(out, plan_model(opened_base, OutputFormat("original", None), opened), opened_base, opened, silent)
    return out


def template_of(directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(directory).chat_template


def inline(directory: Path, template: object) -> None:
    """Put the template where versions of transformers before 4.43 saved it."""
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    parts.edit_json(directory / "tokenizer_config.json", chat_template=template)


def with_tokenizer(checkpoint: Path, directory: Path) -> Path:
    """The checkpoint with a tokenizer that has no chat template."""
    copied = parts.copy(checkpoint, directory)
    parts.save_tokenizer(copied, template=None)
    assert template_of(copied) is None
    return copied


@pytest.fixture
def own_base(base: Path, tmp_path: Path) -> Path:
    return parts.copy(base, tmp_path / "base")


@pytest.mark.parametrize("place", ["file", "inline", "processor"])
def test_the_bases_template_is_served_with_a_tokenizer_that_has_none(
    lora: Path, own_base: Path, tmp_path: Path, place: str
) -> None:
    if place == "inline":
        inline(own_base, parts.TEMPLATE)
    if place == "processor":
        (own_base / "chat_template.jinja").unlink()
        (own_base / "chat_template.json").write_text(json.dumps({"chat_template": parts.TEMPLATE}))

    out = written(with_tokenizer(lora, tmp_path / "checkpoint"), own_base, tmp_path / "out")

    assert template_of(out) == parts.TEMPLATE


@pytest.mark.parametrize("listed", [True, False], ids=["list", "files"])
@pytest.mark.parametrize("own_tokenizer", [True, False])
def test_templates_for_other_uses_are_kept(
    lora: Path, own_base: Path, tmp_path: Path, listed: bool, own_tokenizer: bool
) -> None:
    if listed:
        named = {"default": parts.TEMPLATE, "tool_use": TOOLS}
        inline(own_base, [{"name": name, "template": template} for name, template in named.items()])
    else:
        (own_base / "additional_chat_templates").mkdir()
        (own_base / "additional_chat_templates" / "tool_use.jinja").write_text(TOOLS)
    checkpoint = with_tokenizer(lora, tmp_path / "checkpoint") if own_tokenizer else lora

    out = written(checkpoint, own_base, tmp_path / "out")

    assert template_of(out) == {"default": parts.TEMPLATE, "tool_use": TOOLS}


def test_a_template_of_the_checkpoint_wins_also_without_its_tokenizer(
    lora: Path, own_base: Path, tmp_path: Path
) -> None:
    """llama.cpp prefers the text in tokenizer_config.json, transformers the file: only one of them may be left."""
    inline(own_base, parts.TEMPLATE)
    checkpoint = parts.copy(lora, tmp_path / "checkpoint")
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"chat_template": TOOLS}))

    out = written(checkpoint, own_base, tmp_path / "out")

    assert template_of(out) == TOOLS
    assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())
    assert differing_files(Checkpoint.open(checkpoint), BaseModel.open(own_base)) == (
        "tokenizer_config.json",
        "chat_template.jinja",
    )


@pytest.mark.parametrize(
    "template", [7, [7], [{"name": "x"}], [{"name": "../../x", "template": "y"}], [{"name": "x", "template": 7}]]
)
def test_a_damaged_template_is_refused_by_name(lora: Path, base: Path, tmp_path: Path, template: object) -> None:
    checkpoint = parts.copy(lora, tmp_path / "checkpoint")
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))

    with pytest.raises(CheckpointUnreadable, match=r"tokenizer_config\.json: chat_template is neither"):
        written(checkpoint, base, tmp_path / "out")


@pytest.mark.parametrize("linked", ["directory", "file"])
def test_templates_outside_the_directory_are_not_read(lora: Path, own_base: Path, tmp_path: Path, linked: str) -> None:
    secret = tmp_path / "elsewhere" / "tool_use.jinja"
    secret.parent.mkdir()
    secret.write_text("a secret")
    others = own_base / "additional_chat_templates"
    if linked == "directory":
        others.symlink_to(secret.parent)
    else:
        others.mkdir()
        (others / "tool_use.jinja").symlink_to(secret)

    with pytest.raises(BaseUnreadable, match="symbolic link"):
        written(lora, own_base, tmp_path / "out")
