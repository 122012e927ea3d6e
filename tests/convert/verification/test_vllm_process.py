"""The vLLM process of a verification: its arguments, its environment, and the reason why it ended."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from convert.errors import VerificationFailed, VerificationImpossible
from convert.verification.client import EngineLost
from convert.verification.engine import (
    EngineOptions,
    ServedModel,
    command,
    context_tokens,
    environment,
    log_summary,
    running_engine,
)
from tests.convert.verification.engines import NOWHERE, WITHOUT_VLLM


@pytest.mark.parametrize(("rank", "supported"), [(1, "1"), (9, "16"), (512, "512")])
def test_the_engine_gets_the_next_rank_it_has_kernels_for(tmp_path: Path, rank: int, supported: str) -> None:
    line = command(ServedModel(tmp_path, "base", 512, {"tiny": tmp_path / "adapter"}, rank), EngineOptions())

    assert line[line.index("--max-lora-rank") + 1] == supported
    assert line[line.index("--lora-modules") + 1] == f"tiny={tmp_path / 'adapter'}"


def test_a_rank_that_vllm_cannot_serve_is_reported(tmp_path: Path) -> None:
    with pytest.raises(VerificationImpossible, match="rank 513 is above 512"):
        command(ServedModel(tmp_path, "base", 512, {"tiny": tmp_path}, 513), EngineOptions())


def test_the_users_arguments_come_last(tmp_path: Path) -> None:
    line = command(ServedModel(tmp_path, "tiny", 512), EngineOptions(vllm_args=("--dtype", "float32")))

    assert line[-2:] == ["--dtype", "float32"]
    assert "--enable-lora" not in line


def test_of_a_multimodal_model_the_engine_loads_the_language_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "vision_config": {}}))
    libraries = tmp_path / "libraries"
    (libraries / "torchvision").mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", str(libraries))

    assert "--language-model-only" in command(ServedModel(tmp_path, "tiny", 512), EngineOptions())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3_text"}))
    assert "--language-model-only" not in command(ServedModel(tmp_path, "tiny", 512), EngineOptions())


@pytest.mark.skipif(bool(find_spec("torchvision")), reason="torchvision is installed")
def test_a_multimodal_model_is_not_verified_where_vllm_lacks_torchvision(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "vision_config": {}}))

    with pytest.raises(VerificationImpossible, match=r"NOT VERIFIED: .* vLLM imports torchvision for it"):
        command(ServedModel(tmp_path, "tiny", 512), EngineOptions())


def test_the_context_is_no_longer_than_the_models_own(tmp_path: Path) -> None:
    for config, expected in (({"max_position_embeddings": 128}, 128), ({"max_position_embeddings": 9999}, 512)):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert context_tokens(ServedModel(tmp_path, "tiny", 512)) == expected
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"max_position_embeddings": 64}}))
    assert context_tokens(ServedModel(tmp_path, "tiny", 512)) == 64


def test_the_engine_fetches_nothing_reports_nothing_and_wants_no_key() -> None:
    variables = environment({"HF_HUB_OFFLINE": "0", "VLLM_API_KEY": "secret", "OMP_NUM_THREADS": "3", "HOME": "/home"})

    assert "VLLM_API_KEY" not in variables
    expected = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "3", "HOME": "/home"}
    assert variables.items() >= expected.items()


def test_the_cause_is_found_in_a_long_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "(APIServer pid=1) WARNING 11-24 06:08:30 [u.py:3] This could fail with error like `OSError: [Errno 24]`\n"
        "(EngineCore pid=2) ERROR 11-24 06:08:30 [core.py:1512] Traceback (most recent call last):\n"
        "(EngineCore pid=2) ERROR 11-24 06:08:30 [core.py:1512] torch.Oops.ShapeError: no size 7\n"
        "(EngineCore pid=2) ERROR 11-24 06:08:30 [core.py:1512]   of 47\n"
        "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.\n" + "noise\n" * 20
    )

    assert log_summary(log).startswith(
        "Its reason: torch.Oops.ShapeError: no size 7 of 47\nThe end of its log:\n  noise\n"
    )
    assert log_summary(log).count("noise") == 12


def test_an_engine_that_is_not_there_is_lost() -> None:
    assert not NOWHERE.is_healthy()
    with pytest.raises(EngineLost, match="/v1/completions"):
        NOWHERE.log_probs("tiny", [1, 2])


def test_an_engine_that_ends_at_its_start_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    """A Python that finds a vLLM of ours, which ends at once."""
    package = tmp_path / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    (package / "api_server.py").write_text("raise ValueError('no such architecture')")
    (tmp_path / "vllm-1.0.dist-info").mkdir()
    (tmp_path / "vllm-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 1.0\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {WITHOUT_VLLM} "$@"\n')
    python.chmod(0o755)
    options = EngineOptions(python=python, log=tmp_path / "log")

    with (
        pytest.raises(VerificationFailed, match=r"exit status 1\)\.\nIts reason: ValueError: no such architecture"),
        running_engine(ServedModel(tmp_path, "tiny", 512), options),
    ):
        pass
    assert "no such architecture" in (tmp_path / "log").read_text()
