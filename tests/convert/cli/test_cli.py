"""The command line as a user meets it: exit codes, what is on which stream, what is left on disk."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from convert.artifact import Manifest
from convert.cli.app import app
from tests.convert import parts


def invoke(*arguments: object, columns: int = 100) -> Result:
    environment = {"COLUMNS": str(columns), "NO_COLOR": "1"}
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)


def test_inspect_says_what_it_is_and_gives_the_commands(qlora: Path, base: Path) -> None:
    result = invoke("inspect", qlora, "--base", base)

    assert result.exit_code == 0
    assert "QLoRA (trained on 4-bit weights)" in result.stdout
    assert "args.json: quant_method=bnb, quant_bits=4" in result.stdout
    command = f"python -m convert run {qlora} --base {base} --out DIR"
    assert f"1  {command}\n" in result.stdout
    assert f"2  {command} --route merge --quantize none\n" in result.stdout
    assert "Not offered: a merge back into the same 4 bits." in result.stdout


def test_inspect_of_unknown_training_offers_both(unmarked: Path) -> None:
    result = invoke("inspect", unmarked)

    assert result.exit_code == 0
    assert "--trained-on 4bit" in result.stdout
    assert "--trained-on full" in result.stdout
    assert "needs --base" in result.stdout


def test_inspect_as_json_is_one_document(lora: Path, base: Path) -> None:
    document = json.loads(invoke("inspect", lora, "--base", base, "--json").stdout)

    assert (document["training"], document["layout"], document["ranks"]) == ("lora", "ms-swift", [8])
    assert [(way["route"], way["stored"], way["default"]) for way in document["ways"]] == [
        ("merge", "16-bit", False),
        ("merge", "W8A8 int8", False),
        ("merge", "FP8", False),
        ("merge", "W4A16", False),
        ("merge", "NF4", False),
        ("adapter", "16-bit", False),
        ("adapter", "NF4", False),
        ("rebase", "NF4", False),
    ]
    assert all(way["output_bytes"] > 0 for way in document["ways"])


def test_inspect_shows_which_ways_a_base_cannot_carry(lora: Path, nf4_base: Path) -> None:
    ways = json.loads(invoke("inspect", lora, "--base", nf4_base, "--json").stdout)["ways"]

    assert [way["route"] + way["stored"] for way in ways if way["obstacle"] is None] == ["adapterNF4"]


def test_inspect_of_what_cannot_be_converted_lists_the_problems_and_fails(lora: Path, tmp_path: Path) -> None:
    copied = parts.copy(lora, tmp_path / "copy")
    parts.edit_json(copied / "adapter_config.json", fan_in_fan_out=True)

    result = invoke("inspect", copied)

    assert result.exit_code == 1
    assert "fan_in_fan_out=True" in result.stdout
    assert result.stderr.startswith("error[checkpoint_unsupported]: ")


def test_run_publishes_and_says_what_is_next(lora: Path, base: Path, out: Path) -> None:
    result = invoke("run", lora, "--base", base, "--out", out)

    assert result.exit_code == 0
    assert "KL " in result.stdout
    assert result.stdout.rstrip().endswith(f"Next: python -m serve run {out}")
    assert (out / "manifest.json").is_file()


def test_a_log_file_shows_the_steps_of_a_run_and_json_stays_alone_on_stdout(lora: Path, base: Path, out: Path) -> None:
    result = invoke("run", lora, "--base", base, "--out", out, "--quantize", "none", "--json")

    json.loads(result.stdout)
    steps = re.findall(r"^\[ +\d+\.\d s\] (.+): \d+ of \d+$", result.stderr, re.MULTILINE)
    assert steps[0] == "writing weights"
    assert any(step.startswith("measuring") for step in steps)
    assert len(steps) == len(result.stderr.splitlines())


def test_a_visible_loss_is_called_one(lora: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convert.cli.report.artifact._VISIBLE_KL", 0.01)

    pages = {
        stored: invoke("run", lora, "--base", base, "--out", tmp_path / stored, "--quantize", stored).stdout
        for stored in ("none", "nf4")
    }

    assert {stored: "visible difference" in page for stored, page in pages.items()} == {"none": False, "nf4": True}


def test_run_as_json_prints_the_manifest_and_nothing_else(qlora: Path, base: Path, out: Path) -> None:
    result = invoke("run", qlora, "--base", base, "--out", out, "--json")

    document = json.loads(result.stdout)
    assert document.pop("artifact") == str(out)
    manifest = Manifest.model_validate(document)
    assert manifest == Manifest.model_validate_json((out / "manifest.json").read_bytes())
    assert manifest.versions.keys() == {
        "bitsandbytes",
        "compressed-tensors",
        "graft",
        "peft",
        "safetensors",
        "torch",
        "transformers",
    }
    assert manifest.name == "tiny"


def test_the_default_name_is_that_of_the_directory_in_lower_case(qlora: Path, base: Path, tmp_path: Path) -> None:
    assert invoke("run", qlora, "--base", base, "--out", tmp_path / "Tiny-V2").exit_code == 0
    assert json.loads((tmp_path / "Tiny-V2" / "manifest.json").read_text())["name"] == "tiny-v2"


@pytest.mark.parametrize(
    "arguments",
    [("--name", "a@b"), ("--name", ""), ("--route", "sideways"), ("--max-kl", "-1"), ("--trained-on", "3bit")],
)
def test_usage_errors_exit_with_2(qlora: Path, base: Path, out: Path, arguments: tuple[str, str]) -> None:
    result = invoke("run", qlora, "--base", base, "--out", out, *arguments)

    assert result.exit_code == 2
    assert arguments[0] in result.stderr
    assert not out.exists()


def test_a_directory_that_is_no_name_asks_for_one(qlora: Path, base: Path, tmp_path: Path) -> None:
    result = invoke("run", qlora, "--base", base, "--out", tmp_path / "my model")

    assert result.exit_code == 2
    assert "--name" in result.stderr


def broken(checkpoint: Path, tmp_path: Path, **settings: Any) -> Path:
    copied = parts.copy(checkpoint, tmp_path / "broken")
    parts.edit_json(copied / "adapter_config.json", **settings)
    return copied


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        ("checkpoint_unreadable", ["{base}", "--base", "{base}"]),
        ("checkpoint_unsupported", ["{dora}", "--base", "{base}"]),
        ("training_unknown", ["{unmarked}", "--base", "{base}"]),
        ("base_unreadable", ["{qlora}", "--base", "{qlora}"]),
        ("base_unreadable", ["{qlora}", "--base", "nowhere"]),
        ("base_mismatch", ["{lora}", "--base", "{nf4_base}"]),
        ("route_refused", ["{qlora}", "--base", "{base}", "--route", "merge", "--quantize", "nf4"]),
        ("target_unknown", ["{qlora}", "--base", "{base}", "--target", "toaster"]),
        ("format_refused", ["{lora}", "--base", "{base}", "--quantize", "w4a16", "--target", "cpu"]),
        ("quality_gate_failed", ["{lora}", "--base", "{base}", "--quantize", "nf4", "--max-kl", "0.000001"]),
        ("text_unreadable", ["{lora}", "--base", "{base}", "--text", "nowhere.jsonl"]),
    ],
)
def test_every_mistake_is_one_message_with_a_stable_code_and_nothing_on_disk(
    request: pytest.FixtureRequest, tmp_path: Path, out: Path, code: str, arguments: list[str]
) -> None:
    places = {name: request.getfixturevalue(name) for name in ("base", "qlora", "lora", "unmarked", "nf4_base")}
    places["dora"] = broken(places["lora"], tmp_path, use_dora=True)

    result = invoke("run", *[argument.format(**places) for argument in arguments], "--out", out)

    assert result.exit_code == (3 if code == "quality_gate_failed" else 1)
    # Lines of progress come before the error of a conversion that has begun.
    assert f"\nerror[{code}]: " in f"\n{result.stderr}"
    assert result.stdout == ""
    assert isinstance(result.exception, SystemExit)
    assert list(out.parent.iterdir()) == []


def test_tables_are_whole_on_80_columns_and_commands_are_never_wrapped(
    qlora: Path, lora: Path, base: Path, out: Path, tmp_path: Path
) -> None:
    spaced = parts.copy(qlora, tmp_path / "a checkpoint with spaces in its name")
    screens = {
        "inspect": invoke("inspect", spaced, "--base", base, columns=80).stdout,
        "plan": invoke("plan", lora, "--base", base, "--target", "cuda:9.0", columns=80).stdout,
        "compare": invoke("compare", lora, "--base", base, "--out", out, "--way", "merge:none", columns=80).stdout,
    }

    for name, screen in screens.items():
        table = [line for line in screen.splitlines() if line[:1] in "┏┃┡│├└"]
        assert table, name
        assert max(map(len, table)) <= 80, name
        assert "…" not in "".join(table), name
    command = f"python -m convert run {shlex.quote(str(spaced))} --base {base} --out DIR"
    assert f"\n1  {command}\n" in screens["inspect"]
    assert re.search(r"^2  --route merge --quantize \S+$", screens["plan"], re.MULTILINE)


def test_the_next_command_is_quoted(qlora: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "two words"

    result = invoke("run", qlora, "--base", base, "--out", out, "--name", "tiny", "--no-measure", columns=80)

    assert result.stdout.endswith(f"\nNext: python -m serve run {shlex.quote(str(out))}\n")


def test_verify_tells_a_whole_artifact_from_a_damaged_one(qlora: Path, base: Path, out: Path) -> None:
    invoke("run", qlora, "--base", base, "--out", out)
    assert invoke("verify", out, "--no-engine").exit_code == 0

    (out / "model" / "config.json").write_text("{}")
    result = invoke("verify", out)

    assert result.exit_code == 4
    assert "error[artifact_invalid]" in result.stderr
    assert "model/config.json has other bytes" in result.stderr


def test_verify_of_something_else(base: Path) -> None:
    result = invoke("verify", base)

    assert result.exit_code == 4
    assert "is not an artifact" in result.stderr


def test_help_explains_every_command() -> None:
    assert {"inspect", "plan", "run", "compare", "verify"} <= set(invoke("--help").stdout.split())
    assert "must not exist yet" in " ".join(re.findall(r"\w+", invoke("run", "--help").stdout))


@pytest.mark.parametrize("limit", ["--max-kl", "--min-retention", "--min-gain"])
def test_a_limit_that_nothing_can_be_compared_with_is_refused(
    limit: str, lora: Path, base: Path, tmp_path: Path
) -> None:
    result = invoke("run", lora, "--base", base, "--out", tmp_path / "out", limit, "nan")

    assert result.exit_code == 2
    assert limit in result.stderr
    assert not (tmp_path / "out").exists()
