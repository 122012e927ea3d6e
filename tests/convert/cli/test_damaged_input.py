"""Damaged files end in one message with a stable code, or are read all the same: never in another error or a hang.

`python -m tests.convert.damage` tries every damage; the test here every Nth, of every file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from convert.cli.app import app
from tests.convert import parts
from tests.convert.damage import damaged, outcome_and_message
from tests.convert.damaged_inputs import DamagedInputs

# Of the damages to each directory every Nth is tried, with the cheapest command that reads the file.
_EVERY = {"inspect": 41, "verify": 43, "plan": 127}


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
    (copied / "model-00001-of-00001.safetensors").rename(copied / "part one.safetensors")
    index = json.loads((copied / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "part one.safetensors")
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))

    result = CliRunner().invoke(app, ["run", str(lora), "--base", str(copied), "--out", str(out), "--no-measure"])

    assert "error[base_unreadable]: " in result.stderr
    assert 'model.safetensors.index.json: weight_map names the file "part one.safetensors"' in result.stderr


def test_every_pattern_is_checked_also_behind_one_that_matches(lora: Path, tmp_path: Path) -> None:
    copied = parts.copy(lora, tmp_path / "checkpoint")
    parts.edit_json(copied / "adapter_config.json", rank_pattern={".*": 8, "(": 8})

    result = CliRunner().invoke(app, ["inspect", str(copied)])

    assert "error[checkpoint_unsupported]: " in result.stderr
    assert "rank_pattern holds no valid pattern" in result.stdout
