"""Servers that are started and stopped: a merged model alone, and a state directory that outlives its server."""

from __future__ import annotations

import contextlib
from pathlib import Path

import httpx
import openai
import pytest

from examples.server import running_server
from tests.convert import parts
from tests.e2e.conftest import ENGINE_OPTIONS, Server, Story, convert, reference_logprobs
from tests.e2e.main_job.test_answers import PROMPT, TOLERANCE_NATS, next_token_logprobs


def processes_with(variable: str) -> list[int]:
    """Every process that inherited the variable: a server and whatever it started, under any title or parent."""
    pids = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if variable.encode() in (directory / "environ").read_bytes():
                pids.append(int(directory.name))
    return pids


def test_a_merged_lora_is_served_in_four_bits_and_leaves_no_process_behind(
    story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = f"GRAFT_TEST={tmp_path}"
    monkeypatch.setenv(*mark.split("="))
    lora = parts.mark_lora(parts.copy(story.checkpoints["german"], tmp_path / "lora"))
    convert(lora, story.base, tmp_path / "merged", "--quantize", "nf4")
    merged = parts.load_float32(tmp_path / "merged" / "model")

    with running_server([tmp_path / "merged"], tmp_path / "state", *ENGINE_OPTIONS, log=tmp_path / "log") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == ["merged"]
        for token, logprob in next_token_logprobs(client, "merged").items():
            assert logprob == pytest.approx(float(reference_logprobs(merged, PROMPT)[token]), abs=TOLERANCE_NATS)
        refused = Server(url, tmp_path / "state").command("publish", story.artifacts["german"])
        assert "error[adapter_rejected]" in refused.stderr
        assert len(processes_with(mark)) > 5

    assert processes_with(mark) == []


def test_what_was_published_is_served_again_after_a_restart(story: Story, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with running_server([story.artifacts["french"]], state, *ENGINE_OPTIONS, log=tmp_path / "log") as url:
        published = Server(url, state).command("publish", story.artifacts["french-2"])
        assert published.returncode == 0, published.stderr
        current = httpx.get(f"{url}/v1/models/french").json()["root"]

    with running_server([story.artifacts["french"]], state, *ENGINE_OPTIONS, log=tmp_path / "log") as url:
        assert httpx.get(f"{url}/v1/models/french").json()["root"] == current
        answer = httpx.post(f"{url}/v1/completions", json={"model": "french", "prompt": "the rain", "max_tokens": 1})
        assert answer.json()["model"] == current
