"""A server whose state is in an object store: what another machine published is served here."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from convert.artifact import Artifact
from examples.server import running_server
from serve.adapters.ingest import ingest_artifact
from serve.catalogue.state_dir import StateDir
from tests.e2e.conftest import ENGINE_OPTIONS, Story, run
from tests.object_store import bucket_url, s3_server


def test_what_another_machine_published_is_served_and_what_is_published_here_is_there(
    story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_server() as endpoint:
        store = bucket_url(endpoint, "machines", monkeypatch)
        remote = StateDir(store, tmp_path / "there")
        published = ingest_artifact(Artifact.open(story.artifacts["german"]), "swiss", remote.store)
        remote.log.stage(published)
        remote.log.promote(published)

        local, options = tmp_path / "here", ENGINE_OPTIONS
        with running_server([story.artifacts["french"]], local, *options, log=tmp_path / "log", store=store) as url:
            request = {"model": "swiss", "prompt": "the rain", "max_tokens": 1}
            answer = httpx.post(f"{url}/v1/completions", json=request, timeout=60)
            assert answer.is_success, answer.text
            assert answer.headers["x-graft-model"] == published.adapter.engine_name
            state_options = ("--state", store, "--local", local)
            result = run("serve", "publish", story.artifacts["french-2"], "--name", "swiss", *state_options)
            assert result.returncode == 0, result.stderr

        current = remote.log.read().adapters["swiss"].current
        assert current is not None
        assert current.candidate.revision == Artifact.open(story.artifacts["french-2"]).manifest.adapter.revision  # type: ignore[union-attr]
        assert remote.store.path(current.candidate.adapter).is_dir()
