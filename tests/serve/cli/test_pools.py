"""What the commands about pools ask of a server."""

from __future__ import annotations

from pathlib import Path

from serve.cli.pools import add_missing_pool
from tests.serve.conftest import MakeArtifact
from tests.serve.follower.conftest import RecordingClient


def test_a_publish_adds_the_pool_of_its_base_model_where_there_is_none(
    make_artifact: MakeArtifact, tmp_path: Path
) -> None:
    artifact = make_artifact("pirate")
    client = RecordingClient(tmp_path)

    add_missing_pool(client, artifact.root, "")
    assert client.calls == ["add pirate None 1 None", "wait pirate"]

    client.listed_pools.append({"name": "small-llama", "base": artifact.manifest.model.fingerprint})
    add_missing_pool(client, artifact.root, "")
    assert client.calls[2:] == ["wait small-llama"], "it is served already, or starts"
