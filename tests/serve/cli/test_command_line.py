"""The commands as a user types them, up to where an engine would start."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click import unstyle
from typer.testing import CliRunner

from convert.artifact import digest, file_digests
from serve.catalogue.state_dir import StateDir
from serve.cli.app import app
from serve.cli.run import RunOptions, settings_of_pools
from serve.deployment.pools.bundle import bundles_of
from serve.deployment.pools.room import check_memory, weights_of
from serve.errors import MemoryShort
from serve.settings.admin_tokens import sha256
from tests.serve.conftest import MakeArtifact, write_weights

COMMANDS = (
    "run", "publish", "promote", "rollback", "abandon", "retire", "pin", "unpin", "list", "show", "history", "apply",
    "follow", "status", "move",
)  # fmt: skip


def serve(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serve", *map(str, arguments)],
        check=False, capture_output=True, text=True, timeout=300,
        env={**os.environ, "COLUMNS": "120"},
    )  # fmt: skip


def assert_refused(result: subprocess.CompletedProcess[str], code: str, message: str) -> None:
    assert result.returncode == 1, result.stderr
    assert f"error[{code}]:" in result.stderr
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_wait_ends_when_the_artifact_is_there_and_not_before(tmp_path: Path) -> None:
    settings, artifact = tmp_path / "settings.yaml", tmp_path / "base"
    settings.write_text(f"engine: {{artifact: {artifact}}}")
    waiting = subprocess.Popen(
        [sys.executable, "-m", "serve", "wait", str(settings)], stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    assert waiting.stderr
    assert f"Waiting for {artifact}" in waiting.stderr.readline()

    partial = tmp_path / ".base.partial"
    partial.mkdir()
    (partial / "manifest.json").write_text("{}")
    assert waiting.poll() is None
    partial.rename(artifact)

    assert waiting.wait(timeout=60) == 0
    assert f"{artifact} is there" in waiting.stderr.read()


def test_wait_gives_up_after_its_timeout(tmp_path: Path) -> None:
    assert_refused(serve("wait", tmp_path / "base", "--timeout-s=1"), "artifact_refused", "did not appear within 1 s")


def test_help_names_every_command() -> None:
    result = serve("--help")

    assert result.returncode == 0
    assert all(command in result.stdout for command in (*COMMANDS, "metrics"))


@pytest.mark.parametrize("arguments", [("size", "--help"), ("run", "--help"), ("key", "list")], ids=" ".join)
def test_no_library_prints_a_warning(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    result = serve(*arguments, *(() if "--help" in arguments else ("--state", tmp_path)))

    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])

    assert result.exit_code == 0
    assert "--state" in unstyle(result.output)


@pytest.mark.parametrize("command", ["promote", "abandon"])
def test_a_revision_must_be_named_where_there_is_no_default(tmp_path: Path, command: str) -> None:
    (tmp_path / "server.json").write_text(json.dumps({"url": "http://127.0.0.1:9", "pid": os.getpid()}))

    result = serve(command, "pirate", "--state", tmp_path)

    assert result.returncode == 2
    assert "write NAME@REVISION" in " ".join(result.stderr.split())


def test_a_file_of_adapters_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    assert_refused(
        serve("apply", tmp_path / "nowhere.yaml", "--state", tmp_path), "desired_state_invalid", "can't be read"
    )


def test_a_server_elsewhere_that_does_not_answer_is_told(tmp_path: Path) -> None:
    assert_refused(
        serve("list", "--url", "http://127.0.0.1:9", "--state", tmp_path), "server_not_running", "127.0.0.1:9"
    )


def test_a_state_of_no_known_store_is_refused(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    result = serve("run", make_artifact("a").root, "--state", "ftp://x/y", "--local", tmp_path / "local")

    assert_refused(result, "state_invalid", "Expected a directory, or SCHEME://BUCKET/PREFIX")


def test_a_damaged_adapter_is_refused_before_an_engine_starts(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    artifact = make_artifact("a", rank=2)
    write_weights(artifact.root / "adapter", {"base_model.model.elsewhere.lora_A.weight": np.zeros((2, 4), "f4")})
    files = file_digests(artifact.root / "adapter")
    manifest = json.loads((artifact.root / "manifest.json").read_text())
    manifest["adapter"] |= {"files": files, "revision": digest(files)}
    (artifact.root / "manifest.json").write_text(json.dumps(manifest))

    result = serve("run", artifact.root, "--state", tmp_path / "state")

    assert_refused(result, "artifact_refused", "one of its two factors only")


def test_running_something_that_is_no_artifact_is_refused(tmp_path: Path) -> None:
    assert_refused(serve("run", tmp_path, "--state", tmp_path / "state"), "artifact_refused", "no manifest.json")
    assert not (tmp_path / "state").exists()


def test_models_that_need_more_memory_than_there_is_are_refused_before_anything_starts(
    make_artifact: MakeArtifact,
) -> None:
    bundles = bundles_of([make_artifact("a").root, make_artifact("b", name="b", weights=None, base="other").root])
    needed = sum(bundle.weight_bytes for bundle in bundles)
    assert all(bundle.weight_bytes > 0 for bundle in bundles)

    check_memory(weights_of(bundles, 2), 2 * needed)
    with pytest.raises(MemoryShort, match=r"need 0\.0 GiB \(0\.0 for small-llama, 0\.0 for b\), and 0\.0 GiB"):
        check_memory(weights_of(bundles, 2), 2 * needed - 1)


def test_a_port_in_use_is_told_before_anything_starts(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        result = serve("run", make_artifact("a").root, "--state", tmp_path / "state", "--port", str(port))

    assert_refused(result, "port_in_use", f"Can't listen on 127.0.0.1:{port}")


@pytest.mark.parametrize(
    "argument",
    [
        *("--trust-remote-code", "--trust_remote_code", "--model=/etc", "--api-key=x", "--lora-modules=a=b"),
        *("--hf-overrides.architectures=x", "--middleware+=x", "--worker-extension-cls=x"),
    ],
)
def test_vllm_arguments_that_would_undo_our_promises_are_refused(
    make_artifact: MakeArtifact, tmp_path: Path, argument: str
) -> None:
    result = serve("run", make_artifact("a").root, "--state", tmp_path / "state", f"--vllm-arg={argument}")

    assert_refused(result, "invalid_settings", "can't be passed to vLLM")


def test_origins_of_web_pages_become_a_setting(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    artifact = make_artifact("a").root
    options = RunOptions(artifacts=[artifact], state=str(tmp_path), cors_origin=["https://a.example"])

    (settings,) = settings_of_pools(options, bundles_of([artifact]), state)

    assert settings.gateway.cors_origins == ("https://a.example",)


def test_a_state_path_that_is_a_file_is_refused(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")

    result = serve("run", make_artifact("a").root, "--state", tmp_path / "state")

    assert_refused(result, "state_invalid", "as state directory")


def test_a_state_directory_that_another_server_uses_is_refused(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    state = StateDir(tmp_path / "state")
    state.prepare()
    with state.claimed():
        state.announce("http://127.0.0.1:9")
        result = serve("run", make_artifact("a").root, "--state", state.root)

        assert_refused(result, "state_invalid", f"in use by the server at http://127.0.0.1:9 (process {os.getpid()})")
        assert state.running_server().url == "http://127.0.0.1:9", "the refused one took nothing away"


def test_publishing_without_a_server_is_told(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    result = serve("publish", make_artifact("a").root, "--state", tmp_path / "state")

    assert_refused(result, "server_not_running", "No server runs on the state directory")


def test_publishing_to_a_server_that_died_is_told(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    (tmp_path / "server.json").write_text(json.dumps({"url": "http://127.0.0.1:9", "pid": gone.pid}))

    assert_refused(serve("publish", make_artifact("a").root, "--state", tmp_path), "server_not_running", "is gone")


def test_publishing_under_a_name_that_is_none_is_refused(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    result = serve("publish", make_artifact("a").root, "--state", tmp_path, "--name", "Not a Name")

    assert_refused(result, "artifact_refused", "can't be a name")


def test_the_admin_token_is_the_owners_alone_and_stays_the_same(tmp_path: Path) -> None:
    directory = StateDir(tmp_path)

    token = directory.admin_token()

    assert len(token) >= 32
    assert stat.S_IMODE((tmp_path / "admin.token").stat().st_mode) == 0o600
    assert StateDir(tmp_path).admin_token() == token


def test_every_token_of_the_state_directory_opens_the_admin_api_under_its_label(tmp_path: Path) -> None:
    directory = StateDir(tmp_path)
    (tmp_path / "ci.token").write_text("the secret of the ci\n")

    assert directory.admin_tokens() == {"admin": sha256(directory.admin_token()), "ci": sha256("the secret of the ci")}


@pytest.mark.parametrize("kind", ["canary", "shadow"])
@pytest.mark.parametrize("arguments", [(), ("0123456789ab", "--end")], ids=["neither", "both"])
def test_a_split_is_either_begun_or_ended(tmp_path: Path, kind: str, arguments: tuple[str, ...]) -> None:
    result = serve(kind, "pirate", *arguments, "--state", tmp_path)

    assert result.returncode == 2
    assert "either a REVISION or --end" in " ".join(result.stderr.split())


def test_a_split_needs_a_running_server(tmp_path: Path) -> None:
    assert_refused(serve("canary", "pirate", "0123456789ab", "--state", tmp_path), "server_not_running", "No server")
