"""Damaged files end in one message with a stable code, or are read all the same: never in another error or a hang.

`python -m tests.convert.damage` tries every damage; the test here every Nth, of every file.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from convert.cli.app import app
from convert.errors import BaseUnreadable
from convert.inputs.base_model import BaseModel
from tests.convert import parts
from tests.convert.damage import damaged, outcome_and_message
from tests.convert.damaged_inputs import DamagedInputs

# Of the damages to each directory every Nth is tried, with the cheapest command that reads the file.
_OF_A_STATE = ("gone", "NaN", '"a b"', "256.0", "[]")
_EVERY_OF_WEIGHTS, _EVERY_OF_STATE, _EVERY_OF_COMPARED = 151, 23, 661
_EVERY = {"inspect": 101, "verify": 83, "plan": 251}


@pytest.fixture(scope="module")
def inputs(base: Path, lora: Path, tmp_path_factory: pytest.TempPathFactory) -> DamagedInputs:
    return DamagedInputs.of(tmp_path_factory.mktemp("damaged"), base, lora)


@pytest.mark.parametrize("command", _EVERY)
def test_a_damaged_file_ends_in_an_error_with_a_code_or_is_read(inputs: DamagedInputs, command: str) -> None:
    able = [case for case in inputs.cases() if command in case.commands]
    wrong = []
    for case in able[:: _EVERY[command]]:
        with damaged(case.directory, case.damage, inputs.work) as copy:
            code, message = outcome_and_message(lambda: case.commands[command](copy))  # noqa: B023
        if not case.is_expected(code, message):
            wrong.append(f"{case.directory.name}/{case.damage}: {code}: {message}")

    assert len(able) > 500
    assert wrong == []


def test_damaged_weights_end_in_an_error_with_a_code_or_are_read(inputs: DamagedInputs) -> None:
    """Of shards, and of NF4 weights with the settings that bitsandbytes keeps beside each."""
    able = [case for case in inputs.cases() if case.damage.file.endswith(".safetensors")]
    of_state = [case for case in able if "quant_state" in str(case.damage) and ": " in case.damage.kind]
    wrong = []
    for case in (*able[::_EVERY_OF_WEIGHTS], *of_state[::_EVERY_OF_STATE]):
        command = "plan" if case in of_state else "inspect"
        with damaged(case.directory, case.damage, inputs.work) as copy:
            code, message = outcome_and_message(lambda: case.commands[command](copy))  # noqa: B023
            left = inputs.left_behind(copy)
        if left or not case.is_expected(code, message):
            wrong.append(f"{case.directory.name}/{case.damage}: {code}: {message} {left}")

    assert {case.directory.name for case in able} == {inputs.base.name, "sharded", "compressed", "nf4"}
    assert len(of_state) > 100
    assert wrong == []


def test_a_comparison_of_a_damaged_base_leaves_nothing_behind(inputs: DamagedInputs) -> None:
    able = [case for case in inputs.cases() if "compare" in case.commands and case.directory.name != "compressed"]
    wrong = []
    for case in able[::_EVERY_OF_COMPARED]:
        with damaged(case.directory, case.damage, inputs.work) as copy:
            code, message = outcome_and_message(lambda: case.commands["compare"](copy))  # noqa: B023
            left = inputs.left_behind(copy)
        if left or not case.is_expected(code, message):
            wrong.append(f"{case.directory.name}/{case.damage}: {code}: {message} {left}")

    assert len(able) > 1000
    assert wrong == []


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, value) for key in ("nested_blocksize", "nested_dtype", "blocksize") for value in _OF_A_STATE]
    + [("nested_offset", value) for value in _OF_A_STATE if value != "256.0"]
    + [("another", "7")],
)
def test_a_state_of_an_nf4_weight_that_bitsandbytes_would_stumble_over_is_named(
    inputs: DamagedInputs, tmp_path: Path, key: str, value: str
) -> None:
    directory = inputs.bases[-1]
    copied = parts.copy(directory, tmp_path / "base")
    path = copied / "model.safetensors"
    name = next(name for name in load_file(path) if name.endswith("quant_state.bitsandbytes__nf4"))
    state = json.loads(bytes(load_file(path)[name].tolist()))
    texts = {each: json.dumps(kept) for each, kept in state.items()} | {key: value}
    text = "{" + ", ".join(f'"{each}": {text}' for each, text in texts.items() if text != "gone") + "}"
    weights = load_file(path) | {name: torch.tensor(list(text.encode()), dtype=torch.uint8)}
    save_file(weights, path, {"format": "pt"})

    with pytest.raises(BaseUnreadable, match=f"'{re.escape(name)}' is not what bitsandbytes writes"):
        BaseModel.open(copied)


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("value", [-1, 10**30, {}, [[1]], "x", True, [1, -1], 1.5])
def test_a_stop_token_that_is_no_token_id_is_named_with_its_file(
    lora: Path, base: Path, tmp_path: Path, file: str, value: object
) -> None:
    _is_named(lora, base, tmp_path, file, "eos_token_id", value)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("tokenizer_config.json", "model_max_length", "long"),
        ("tokenizer_config.json", "model_max_length", True),
        ("tokenizer_config.json", "eos_token", 7),
        ("tokenizer_config.json", "padding_side", "top"),
        ("config.json", "hidden_size", -1),
        ("config.json", "num_hidden_layers", "two"),
        ("config.json", "model_type", None),
        ("config.json", "rms_norm_eps", float("nan")),
        ("config.json", "tie_word_embeddings", "false"),
        ("config.json", "quantization_config", "compressed-tensors"),
        ("config.json", "quantization_config", "bitsandbytes"),
    ],
)
def test_a_setting_of_a_wrong_type_is_named_with_its_file(
    lora: Path, base: Path, tmp_path: Path, file: str, key: str, value: object
) -> None:
    _is_named(lora, base, tmp_path, file, key, value)


def _is_named(checkpoint: Path, base: Path, tmp_path: Path, file: str, key: str, value: object) -> None:
    copied = parts.copy(base, tmp_path / "base")
    parts.edit_json(copied / file, **{key: value})

    result = CliRunner().invoke(app, ["plan", str(checkpoint), "--base", str(copied)], env={"NO_COLOR": "1"})

    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    line = next(line for line in result.stderr.splitlines() if line.startswith("error["))
    assert line.startswith(f"error[base_unreadable]: {copied / file}: ")
    assert f"{key} is {json.dumps(value)[:50]}" in line


@pytest.mark.parametrize("damage", ["special tokens", "vocabulary", "added tokens", "half of it"])
def test_a_tokenizer_that_no_library_loads_is_an_error_that_names_it(
    lora: Path, base: Path, tmp_path: Path, damage: str
) -> None:
    copied = parts.copy(base, tmp_path / "base")
    path = copied / "tokenizer.json"
    document = json.loads(path.read_text())
    if damage == "half of it":
        path.write_bytes(path.read_bytes()[:200])
    else:
        changes = {
            "special tokens": {"post_processor": 7},
            "vocabulary": {"model": []},
            "added tokens": {"added_tokens": 7},
        }
        path.write_text(json.dumps(document | changes[damage]))

    result = CliRunner().invoke(app, ["plan", str(lora), "--base", str(copied)])

    assert isinstance(result.exception, SystemExit)
    assert f"error[base_unreadable]: The tokenizer of {copied} can't be loaded" in result.stderr


def test_a_named_pipe_is_not_waited_for(lora: Path, base: Path, tmp_path: Path) -> None:
    copied = parts.copy(lora, tmp_path / "checkpoint")
    for name in ("README.md", "args.json", "training_args.yaml"):
        (copied / name).unlink(missing_ok=True)
        os.mkfifo(copied / name)

    code, message = outcome_and_message(
        lambda: CliRunner().invoke(app, ["inspect", str(copied)], catch_exceptions=False)
    )

    assert (code, message) == ("ok", "")


def test_a_shard_whose_name_no_manifest_takes_is_refused_before_anything_is_written(
    lora: Path, inputs: DamagedInputs, tmp_path: Path, out: Path
) -> None:
    copied = parts.copy(inputs.bases[0], tmp_path / "base")
    (copied / "model-00001-of-00002.safetensors").rename(copied / "part one.safetensors")
    index = (copied / "model.safetensors.index.json").read_text()
    (copied / "model.safetensors.index.json").write_text(
        index.replace("model-00001-of-00002.safetensors", "part one.safetensors")
    )

    result = CliRunner().invoke(app, ["run", str(lora), "--base", str(copied), "--out", str(out), "--no-measure"])

    assert "error[base_unreadable]: " in result.stderr
    assert 'model.safetensors.index.json: weight_map names the file "part one.safetensors"' in result.stderr


def test_every_pattern_is_checked_also_behind_one_that_matches(lora: Path, tmp_path: Path) -> None:
    copied = parts.copy(lora, tmp_path / "checkpoint")
    parts.edit_json(copied / "adapter_config.json", rank_pattern={".*": 8, "(": 8})

    result = CliRunner().invoke(app, ["inspect", str(copied)])

    assert "error[checkpoint_unsupported]: " in result.stderr
    assert "rank_pattern holds no valid pattern" in result.stdout
