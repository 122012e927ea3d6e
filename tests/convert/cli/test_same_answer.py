"""A bad input gets one answer: `inspect`, `plan` and `run` refuse it with the same code."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from convert.cli.app import app
from convert.quantization.compressed import NAMES, CompressedName
from tests.convert import parts

Spoil = Callable[[Path], object]


def settings(**changes: Any) -> Spoil:
    return lambda root: parts.edit_json(root / "adapter_config.json", **changes)


def config(**changes: Any) -> Spoil:
    return lambda root: parts.edit_json(root / "config.json", **changes)


def file(name: str, content: bytes) -> Spoil:
    return lambda root: (root / name).write_bytes(content)


def without(*names: str) -> Spoil:
    return lambda root: [(root / name).unlink() for name in names]


def shorter(name: str) -> Spoil:
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:-9])


def dangling(name: str) -> Spoil:
    def spoil(root: Path) -> None:
        (root / name).unlink(missing_ok=True)
        (root / name).symlink_to("/nowhere")

    return spoil


def weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Spoil:
    def spoil(root: Path) -> None:
        path = root / "model.safetensors"
        save_file(change(load_file(path)), path, {"format": "pt"})

    return spoil


def broken_tokenizer(root: Path) -> None:
    parts.save_tokenizer(root)
    path = root / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": []}))


CHECKPOINTS: dict[str, tuple[Spoil, str]] = {
    "gone": (shutil.rmtree, "checkpoint_unreadable"),
    "no settings": (without("adapter_config.json"), "checkpoint_unreadable"),
    "settings are no JSON": (file("adapter_config.json", b"{"), "checkpoint_unreadable"),
    "truncated": (shorter("adapter_model.safetensors"), "checkpoint_unreadable"),
    "a dangling link": (dangling("tokenizer.json"), "checkpoint_unreadable"),
    "a stamp that is no object": (file("graft_training.json", b"[]"), "checkpoint_unreadable"),
    "a broken tokenizer": (broken_tokenizer, "checkpoint_unreadable"),
    "a template that is no text": (file("tokenizer_config.json", b'{"chat_template": 7}'), "checkpoint_unreadable"),
    "a template in another encoding": (file("chat_template.jinja", b"\xff\xfe"), "checkpoint_unreadable"),
    "a setting of no route": (settings(lora_bias=True), "checkpoint_unsupported"),
    "another rank": (settings(r=9), "checkpoint_unsupported"),
    "targets that are no pattern": (settings(target_modules="("), "checkpoint_unsupported"),
    "targets without those of the weights": (settings(target_modules=["k_proj"]), "checkpoint_unsupported"),
    "no targets": (settings(target_modules=None), "checkpoint_unsupported"),
    "all modules excluded": (settings(exclude_modules=parts.LINEARS), "checkpoint_unsupported"),
    "other layers": (settings(layers_to_transform=[0]), "checkpoint_unsupported"),
    "a task that PEFT does not know": (settings(task_type="WALK"), "checkpoint_unsupported"),
    "modules to save that are no list": (settings(modules_to_save=7), "checkpoint_unsupported"),
    "trained on GPTQ": (file("args.json", b'{"quant_method": "gptq", "quant_bits": 4}'), "checkpoint_unsupported"),
    "more tokens than the base": (
        lambda root: parts.save_tokenizer(root, tokens=tuple(f"<{number}>" for number in range(400))),
        "base_mismatch",
    ),
}
BASES: dict[str, tuple[Spoil, str]] = {
    "gone": (shutil.rmtree, "base_unreadable"),
    "no config": (without("config.json"), "base_unreadable"),
    "truncated": (shorter("model.safetensors"), "base_unreadable"),
    "a dangling link": (dangling("generation_config.json"), "base_unreadable"),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), "base_unreadable"),
    "a tokenizer without a vocabulary": (file("tokenizer.json", b"{}"), "base_unreadable"),
    "tokenizer settings that are no JSON": (file("tokenizer_config.json", b"{"), "base_unreadable"),
    "a template that would hold up a server": (
        file("chat_template.jinja", b"{{ 'ab' * 9000000 }}"),
        "base_unreadable",
    ),
    "another kind of model": (config(model_type="mamba"), "architecture_unknown"),
    "heads that do not fit": (config(num_attention_heads=7), "base_unreadable"),
    "an unknown activation": (config(hidden_act="wave"), "base_unreadable"),
    "quantized by GPTQ": (config(quantization_config={"quant_method": "gptq"}), "base_unreadable"),
    "a norm of another size": (
        weights(lambda tensors: tensors | {"model.norm.weight": torch.ones(3)}),
        "base_unreadable",
    ),
    "a weight less": (
        weights(lambda tensors: {name: tensors[name] for name in tensors if "1.mlp.up" not in name}),
        "base_unreadable",
    ),
}


def code(*words: object) -> str:
    """The code of the error that a command ends with; `ok` where it succeeds."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    error = re.search(r"^error\[(\w+)\]: ", result.stderr, re.MULTILINE)
    return error[1] if error else "ok" if result.exit_code == 0 else f"exit {result.exit_code}"


def codes(checkpoint: Path, base: Path, out: Path) -> list[str]:
    arguments = (checkpoint, "--base", base)
    return [code("inspect", *arguments), code("plan", *arguments), code("run", *arguments, "--out", out)]


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_bad_checkpoint_gets_one_answer(lora: Path, base: Path, tmp_path: Path, out: Path, kind: str) -> None:
    spoil, expected = CHECKPOINTS[kind]
    copied = parts.copy(lora, tmp_path / "checkpoint")
    spoil(copied)

    assert codes(copied, base, out) == [expected] * 3


@pytest.mark.parametrize("kind", BASES)
def test_a_bad_base_gets_one_answer(lora: Path, base: Path, tmp_path: Path, out: Path, kind: str) -> None:
    spoil, expected = BASES[kind]
    copied = parts.copy(base, tmp_path / "base")
    spoil(copied)

    assert codes(lora, copied, out) == [expected] * 3


def test_a_base_of_another_size_gets_one_answer(lora: Path, tmp_path: Path, out: Path) -> None:
    other = parts.save_base(tmp_path / "other", tied=True, hidden=32)

    assert codes(lora, other, out) == ["base_mismatch"] * 3


@pytest.mark.parametrize("name", NAMES)
def test_a_compressed_base_of_a_qlora_gets_one_answer(
    qlora: Path, base: Path, tmp_path: Path, out: Path, name: CompressedName
) -> None:
    compressed = parts.save_compressed(base, tmp_path / "base", name)

    assert codes(qlora, compressed, out) == ["base_mismatch"] * 3


def test_what_inspect_offers_on_a_quantized_base_is_what_plan_takes(lora: Path, nf4_base: Path) -> None:
    shown = CliRunner().invoke(app, ["inspect", str(lora), "--base", str(nf4_base), "--json"])
    offers = json.loads(shown.stdout)["ways"]

    for offer in offers:
        words = offer["command"].split()[4:]
        answer = code("plan", *(word for word in words if word not in ("--out", "DIR")))
        assert (answer == "ok") == (offer["obstacle"] is None), offer

    assert {offer["obstacle"] is None for offer in offers} == {True, False}
