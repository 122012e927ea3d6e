from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from serve.cli.advise import COLD_MS
from serve.cli.app import app
from tests.serve.capacity.test_traffic import lines


def ask(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["advise", *map(str, arguments)])


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe\x00", b'{"time": 0, "model": "a", "tokens": 1}\n'])
def test_a_log_without_traffic_is_an_error_of_its_own(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "log").write_bytes(content)

    result = ask("--log", tmp_path / "log")

    assert result.exit_code == 1
    assert "error[traffic_log_invalid]" in result.output


def test_a_missing_log_is_an_error_of_its_own(tmp_path: Path) -> None:
    assert "error[traffic_log_invalid]" in ask("--log", tmp_path / "none").output


def test_the_command_tells_what_to_merge_as_json(tmp_path: Path) -> None:
    loud = ({"time": n / 100, "model": "loud", "tokens": 400} for n in range(3000))
    quiet = ({"time": n, "model": f"quiet-{n}", "tokens": 10} for n in range(30))
    path = lines(tmp_path / "log", *loud, *quiet)

    result = ask("--log", path, "--places", 64, "--max-active-adapters", 32, "--adapter-overhead", 1.4,
                 "--requests", 4000, "--json")  # fmt: skip

    document = json.loads(result.output)
    assert [model["name"] for model in document["merge"]] == ["loud"]
    assert len(document["keep_together"]) == 30
    assert document["plans"]["best"]["gpus"] < document["plans"]["together"]["gpus"]


def test_the_size_of_a_gpu_gives_places_and_memory() -> None:
    result = ask("--model", "llama-3.2-1b", "--gpu", "l4", "--host-gib", 1, "--adapters", 3, "--rate", 1,
                 "--requests", 500, "--json")  # fmt: skip

    pool = json.loads(result.output)["pool"]
    assert pool["resident"] == (1 << 30) // (16 * (4 * 2048 + 2 * 2560 + 3 * 10240) * 16 * 2)
    assert pool["places"] == 256


def test_a_model_that_does_not_fit_is_told() -> None:
    assert "leaves no room" in " ".join(ask("--model", "llama-3.3-70b", "--gpu", "t4").output.split())


def test_the_cost_of_a_cold_start_is_the_measured_one() -> None:
    results = Path(__file__).parents[3] / "benchmarks" / "results" / "swap.json"

    assert pytest.approx(json.loads(results.read_text())["figures"]["cold_minus_warm_ms"]["value"], rel=0.5) == COLD_MS
