"""The commands as a user types them, up to where an engine would start."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from serve.state import StateDir
from tests.serve.conftest import MakeArtifact


def serve(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serve", *map(str, arguments)],
        check=False, capture_output=True, text=True, timeout=60,
        env={**os.environ, "COLUMNS": "120"},
    )  # fmt: skip


def assert_refused(result: subprocess.CompletedProcess[str], code: str, told: str) -> None:
    assert result.returncode == 1, result.stderr
    assert f"error[{code}]:" in result.stderr
    assert told in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_help_names_every_command() -> None:
    result = serve("--help")

    assert result.returncode == 0
    assert all(command in result.stdout for command in ("run", "publish", "status"))


def test_running_something_that_is_no_artifact_is_refused(tmp_path: Path) -> None:
    assert_refused(serve("run", tmp_path, "--state", tmp_path / "state"), "artifact_refused", "no manifest.json")
    assert not (tmp_path / "state").exists()


def test_a_port_in_use_is_told_before_anything_starts(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        result = serve("run", make_artifact("a").root, "--state", tmp_path / "state", "--port", str(port))

    assert_refused(result, "port_in_use", f"Can't listen on 127.0.0.1:{port}")


@pytest.mark.parametrize("argument", ["--trust-remote-code", "--model=/etc", "--api-key=x", "--lora-modules=a=b"])
def test_vllm_arguments_that_would_undo_our_promises_are_refused(
    make_artifact: MakeArtifact, tmp_path: Path, argument: str
) -> None:
    result = serve("run", make_artifact("a").root, "--state", tmp_path / "state", f"--vllm-arg={argument}")

    assert_refused(result, "invalid_settings", "can't be passed to vLLM")


def test_a_state_path_that_is_a_file_is_refused(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")

    result = serve("run", make_artifact("a").root, "--state", tmp_path / "state")

    assert_refused(result, "state_invalid", "as state directory")


def test_a_state_directory_that_another_server_uses_is_refused(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    (tmp_path / "server.json").write_text(json.dumps({"url": "http://127.0.0.1:9", "pid": os.getpid()}))

    result = serve("run", make_artifact("a").root, "--state", tmp_path)

    assert_refused(result, "state_invalid", f"in use by the server at http://127.0.0.1:9 (process {os.getpid()})")


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


@pytest.mark.parametrize("kind", ["canary", "shadow"])
@pytest.mark.parametrize("arguments", [(), ("0123456789ab", "--end")], ids=["neither", "both"])
def test_a_split_is_either_begun_or_ended(tmp_path: Path, kind: str, arguments: tuple[str, ...]) -> None:
    result = serve(kind, "pirate", *arguments, "--state", tmp_path)

    assert result.returncode == 2
    assert "either a REVISION or --end" in " ".join(result.stderr.split())


def test_a_split_needs_a_running_server(tmp_path: Path) -> None:
    assert_refused(serve("canary", "pirate", "0123456789ab", "--state", tmp_path), "server_not_running", "No server")
