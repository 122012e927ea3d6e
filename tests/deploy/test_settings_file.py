"""Settings as a deployment's file says them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from serve.catalogue.state_dir import RunningServer, StateDir
from serve.deployment.app import build
from serve.deployment.settings_file import settings_of
from serve.errors import ArtifactRefused, ServerNotRunning, StateInvalid
from serve.settings import ServeSettings
from serve.settings.admin_tokens import sha256
from tests.deploy.manifests import DEPLOY, needs_kubectl, only, rendered
from tests.serve.conftest import MakeArtifact


def write(path: Path, **document: object) -> dict[str, str]:
    path.write_text(yaml.safe_dump(document))
    return {"settings_file": str(path)}


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    directory = tmp_path / "admin"
    directory.mkdir()
    (directory / "admin.token").write_text("the secret of an admin\n")
    (directory / "pipeline.token").write_text("the secret of a pipeline")
    return directory


def test_artifact_and_tokens_become_what_they_stand_for(
    make_artifact: MakeArtifact, tokens: Path, tmp_path: Path
) -> None:
    artifact = make_artifact("a")

    settings = settings_of(
        write(
            tmp_path / "settings.yaml",
            engine={"artifact": str(artifact.root), "max_lora_rank": 32},
            gateway={"admin_tokens_dir": str(tokens), "max_wait_s": 5},
            state_dir=str(tmp_path / "state"),
            replicas=2,
        )
    )

    assert settings.engine.model_path == artifact.root / "model"
    assert settings.engine.model_name == "small-llama"
    assert settings.engine.fingerprint == artifact.manifest.model.fingerprint
    assert settings.engine.max_lora_rank == 32
    assert settings.gateway.admin_tokens == {
        "admin": sha256("the secret of an admin"),
        "pipeline": sha256("the secret of a pipeline"),
    }
    assert (settings.gateway.max_wait_s, settings.replicas) == (5, 2)


def test_a_model_goes_by_the_name_that_is_said(make_artifact: MakeArtifact, tokens: Path, tmp_path: Path) -> None:
    settings = settings_of(
        write(
            tmp_path / "settings.yaml",
            engine={"artifact": str(make_artifact("a").root), "model_name": "house-model"},
            gateway={"admin_tokens_dir": str(tokens)},
            state_dir=str(tmp_path / "state"),
        )
    )

    assert settings.engine.model_name == "house-model"


def test_settings_said_in_full_are_taken_as_they_are(tmp_path: Path) -> None:
    plain = {
        "engine": {"model_path": str(tmp_path), "model_name": "base", "fingerprint": "b" * 64},
        "gateway": {"admin_tokens": {"admin": "a" * 64}},
        "state_dir": str(tmp_path),
    }

    assert settings_of(plain) == ServeSettings.model_validate(plain)


def test_a_damaged_base_never_starts(make_artifact: MakeArtifact, tokens: Path, tmp_path: Path) -> None:
    artifact = make_artifact("a")
    weights = artifact.root / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")

    with pytest.raises(ArtifactRefused):
        settings_of(
            write(
                tmp_path / "settings.yaml",
                engine={"artifact": str(artifact.root)},
                gateway={"admin_tokens_dir": str(tokens)},
                state_dir=str(tmp_path),
            )
        )


def test_a_file_that_is_not_there_is_reported(tmp_path: Path) -> None:
    with pytest.raises(StateInvalid, match=r"nowhere\.yaml can't be read"):
        build({"settings_file": str(tmp_path / "nowhere.yaml")})


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", ""], ids=["a list", "no YAML", "empty"])
def test_a_file_that_says_nothing_is_reported(tmp_path: Path, text: str) -> None:
    (tmp_path / "settings.yaml").write_text(text)

    with pytest.raises(StateInvalid, match=r"settings\.yaml"):
        settings_of({"settings_file": str(tmp_path / "settings.yaml")})


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"gateway": [[]]}, "gateway of the settings file"),
        ({"engine": 1e308}, "engine of the settings file"),
        ({"engine": {"artifact": True}}, r"engine\.artifact of the settings file"),
        ({"gateway": {"admin_tokens_dir": "a\0b"}}, r"gateway\.admin_tokens_dir of the settings file"),
    ],
)
def test_a_part_of_another_kind_is_reported(tmp_path: Path, document: dict[str, object], message: str) -> None:
    with pytest.raises(StateInvalid, match=message):
        settings_of(write(tmp_path / "s.yaml", **document))


def test_an_unknown_setting_is_refused(tmp_path: Path, tokens: Path) -> None:
    with pytest.raises(ValidationError, match="replica"):
        settings_of(write(tmp_path / "s.yaml", gateway={"admin_tokens_dir": str(tokens)}, replica=2))


def test_nobody_starts_a_server_that_nobody_may_publish_to(tmp_path: Path) -> None:
    with pytest.raises(StateInvalid, match=r"holds no LABEL\.token"):
        settings_of(write(tmp_path / "s.yaml", gateway={"admin_tokens_dir": str(tmp_path)}))


def test_an_empty_secret_starts_no_server(tokens: Path, tmp_path: Path) -> None:
    (tokens / "pipeline.token").write_text("\n")

    with pytest.raises(StateInvalid, match=r"admin token .*pipeline\.token is empty"):
        settings_of(write(tmp_path / "s.yaml", gateway={"admin_tokens_dir": str(tokens)}))


@needs_kubectl
@pytest.mark.parametrize("overlay", ["dev-ray", "prod"])
def test_the_rendered_settings_are_accepted(
    make_artifact: MakeArtifact, tokens: Path, tmp_path: Path, overlay: str
) -> None:
    """As they are, but for the paths of a container."""
    text: str = only(rendered(overlay), "ConfigMap", "graft-settings")["data"]["settings.yaml"]
    text = text.replace("/srv/graft/artifacts/base", str(make_artifact("base").root))
    (tmp_path / "settings.yaml").write_text(text.replace("/srv/graft/admin", str(tokens)))

    settings = settings_of({"settings_file": str(tmp_path / "settings.yaml")})

    assert settings.replicas == 2
    assert settings.state_dir == Path("/srv/graft/state/base")


def test_the_settings_of_an_overlay_lie_where_the_serve_config_looks() -> None:
    config = (DEPLOY / "base" / "rayservice" / "rayservice.yaml").read_text()

    assert "settings_file: /srv/graft/settings/settings.yaml" in config
    assert "mountPath: /srv/graft/settings," in config


def test_a_new_container_is_not_taken_for_the_server_whose_number_it_has(tmp_path: Path) -> None:
    """Killed containers leave server.json behind, and the next one's processes have the same numbers."""
    state = StateDir(tmp_path)
    state.announce("http://127.0.0.1:8000")

    running = state.running_server()
    earlier = RunningServer(url=running.url, pid=running.pid, started=(running.started or 0) - 100)
    (tmp_path / "server.json").write_text(earlier.model_dump_json())

    with pytest.raises(ServerNotRunning, match="is gone"):
        state.running_server()


def test_following_a_file_ends_on_sigterm_and_tells_what_it_could_not_do(tmp_path: Path) -> None:
    (tmp_path / "adapters.yaml").write_text("adapters: []\n")
    command = ["follow", tmp_path / "adapters.yaml", "--state", tmp_path / "state", "--url", "http://127.0.0.1:9"]
    process = subprocess.Popen(
        [sys.executable, "-m", "serve", *map(str, command)],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert process.stderr is not None
    line = process.stderr.readline()
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)

    assert "was not applied: error[server_not_running]" in line
    assert process.wait(timeout=60) == 0


def test_the_bucket_may_be_named_by_a_variable_of_the_pod(
    make_artifact: MakeArtifact, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the ConfigMap graft-state-place of the component object-store gives it to servers and publishers alike."""
    named: dict[str, object] = {
        "engine": {"artifact": str(make_artifact("a").root)},
        "gateway": {"admin_tokens_dir": str(tokens)},
        "state_dir": str(tmp_path / "state"),
    }
    assert settings_of(write(tmp_path / "s.yaml", **named)).state_url is None

    monkeypatch.setenv("GRAFT_STATE_URL", "s3://bucket/state")
    assert settings_of(write(tmp_path / "s.yaml", **named)).state_url == "s3://bucket/state"
    assert settings_of(write(tmp_path / "s.yaml", **named, state_url="s3://bucket/state")).state_url

    with pytest.raises(StateInvalid, match=r"GRAFT_STATE_URL .*Name one place"):
        settings_of(write(tmp_path / "s.yaml", **named, state_url="s3://other/state"))
