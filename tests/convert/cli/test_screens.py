"""The screens on a terminal of 80 columns: nothing is cut off, and what is to be copied stays in one line."""

from __future__ import annotations

import json
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import save_file

from convert.cli.app import app
from convert.safetensors_io.tensors import TensorSpec
from tests.convert import parts
from tests.convert.cli.test_cli import invoke

LAYERS, HIDDEN, INNER, KEYS, VOCABULARY = 28, 3072, 8192, 1024, 128256
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
BORDERS = "┏┃┡│├└"


def _sparse_base(tokenizer: Path, directory: Path) -> Path:
    """A model of the shape of Llama 3.2 3B, whose weights are zeros that take no room on the disk."""
    shutil.copytree(tokenizer, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True}
    parts.edit_json(directory / "config.json", **sizes, **heads)
    specs = [TensorSpec("model.embed_tokens.weight", "BF16", (VOCABULARY, HIDDEN))]
    specs.append(TensorSpec("model.norm.weight", "BF16", (HIDDEN,)))
    for layer in range(LAYERS):
        place = f"model.layers.{layer}"
        specs += [TensorSpec(f"{place}.{name}.weight", "BF16", shape) for name, shape in SHAPES.items()]
        specs += [
            TensorSpec(f"{place}.{name}.weight", "BF16", (HIDDEN,))
            for name in ("input_layernorm", "post_attention_layernorm")
        ]
    entries: dict[str, object] = {}
    end = 0
    for spec in specs:
        entries[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [end, end + spec.nbytes]}
        end += spec.nbytes
    header = json.dumps(entries).encode()
    with (directory / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(8 + len(header) + end)
    return directory


def _adapter(lora: Path, directory: Path) -> Path:
    copied = parts.copy(lora, directory)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(LAYERS):
        for name, (rows, columns) in SHAPES.items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            tensors |= {f"{module}.lora_A.weight": torch.ones(8, columns, dtype=torch.bfloat16)}
            tensors |= {f"{module}.lora_B.weight": torch.ones(rows, 8, dtype=torch.bfloat16)}
    save_file(tensors, copied / "adapter_model.safetensors")
    return copied


@pytest.fixture(scope="module")
def large(base: Path, lora: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    home = tmp_path_factory.mktemp("large")
    return _adapter(lora, home / "checkpoint"), _sparse_base(base, home / "Llama-3.2-3B-Instruct")


def table_of(screen: str) -> list[str]:
    return [line for line in screen.splitlines() if line[:1] in BORDERS]


@pytest.mark.parametrize("stored", ["w4a16", "none"])
def test_the_plan_of_a_model_of_3_billion_weights_fits_into_80_columns(large: tuple[Path, Path], stored: str) -> None:
    checkpoint, base = large
    asked = ("plan", checkpoint, "--base", base, "--route", "merge", "--quantize", stored, "--target", "cuda:9.0")

    screen = invoke(*asked, columns=80).stdout
    document = json.loads(invoke(*asked, "--json").stdout)

    table = table_of(screen)
    assert max(map(len, table)) <= 80
    assert "…" not in screen
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table if line.startswith("│")]
    rows = {cell[0]: cell[1:] for cell in cells}
    part = ".weight_packed" if stored == "w4a16" else ".weight"
    assert {f"{name}{part}" for name in SHAPES} <= rows.keys()
    assert {"model.embed_tokens.weight", "model.norm.weight", "post_attention_layernorm.weight"} <= rows.keys()
    assert "model.layers.*, in each layer:" in rows
    tensors = [spec["name"] for spec in document["ways"][0]["tensors"]]
    counts = [[int(number) for number in cell[2].split(" x ")] for cell in rows.values() if len(cell) == 4 and cell[2]]
    assert sum(count[0] * (count[1] if len(count) > 1 else 1) for count in counts if count) == len(tensors)
    assert re.search(rf"^1  --route merge --quantize {stored}$", screen, re.MULTILINE)


def test_a_long_path_is_shown_whole(lora: Path, base: Path, tmp_path: Path) -> None:
    long = parts.copy(lora, tmp_path / ("a-checkpoint-with-a-name-of-many-words-" * 4))

    for command in (("inspect", long), ("plan", long, "--base", base, "--target", "cpu", "--quantize", "none")):
        screen = invoke(*command, columns=80).stdout

        assert "…" not in screen
        assert str(long) in "".join(line.strip() for line in screen.splitlines())


def test_an_option_of_several_commands_has_one_form_and_one_help() -> None:
    group = typer.main.get_command(app)
    seen: dict[str, set[tuple[object, ...]]] = {}
    for name in ("plan", "run", "compare"):
        for option in group.commands[name].params:  # type: ignore[attr-defined]
            form = (
                *option.opts,
                *option.secondary_opts,
                option.metavar,
                getattr(getattr(option, "type", None), "name", None),
                option.default,
                option.help,
            )
            seen.setdefault(option.name, set()).add(form)

    own = {"out"}  # an artifact of `run`, a page of `compare`
    assert {name: forms for name, forms in seen.items() if len(forms) > 1 and name not in own} == {}
    assert {"rank", "steps", "method", "calibration", "target", "trained_on", "text"} <= seen.keys()


@pytest.mark.parametrize("command", ["plan", "run"])
def test_no_choice_is_broken_in_two_on_a_help_page_of_80_columns(command: str) -> None:
    page = invoke(command, "--help", columns=80).stdout

    choices = ("w8a8-int8", "fp8-dynamic", "w4a16", "recover", "dequantized", "bfloat16", "float16", "gptq")
    assert [choice for choice in choices if choice not in page] == []
