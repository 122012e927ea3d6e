"""Signatures of adapters, against openssl's as the oracle."""

from __future__ import annotations

import base64
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from convert.artifact.signature import is_signed, public_key, signature_of, statement
from convert.cli.app import app
from convert.errors import SigningKeyInvalid

REVISION, BASE = "a" * 64, "b" * 64


def make_key(directory: Path, algorithm: str = "ed25519") -> tuple[Path, Path]:
    private, public = directory / f"{algorithm}.pem", directory / f"{algorithm}.pub"
    subprocess.run(["openssl", "genpkey", "-algorithm", algorithm, "-out", private], check=True, capture_output=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    return private, public


def signed_by_openssl(private: Path, content: bytes) -> str:
    file = private.with_suffix(".in")
    file.write_bytes(content)
    command = ["openssl", "pkeyutl", "-sign", "-inkey", private, "-rawin", "-in", file]
    return base64.b64encode(subprocess.run(command, check=True, capture_output=True).stdout).decode()


def test_a_signature_holds_for_what_was_signed_and_for_nothing_else(tmp_path: Path) -> None:
    private, public = make_key(tmp_path)
    keys = [public_key(public)]
    signature = signed_by_openssl(private, statement(REVISION, BASE, None))

    assert is_signed(signature, statement(REVISION, BASE, None), keys)
    for other in (
        statement("c" * 64, BASE, None),
        statement(REVISION, "c" * 64, None),
        statement(REVISION, BASE, "d" * 64),
    ):
        assert not is_signed(signature, other, keys)


def test_a_signature_holds_for_any_of_the_keys_and_for_no_other_key(tmp_path: Path) -> None:
    for name in ("known", "other"):
        (tmp_path / name).mkdir()
    private, known = make_key(tmp_path / "known")
    _, other = make_key(tmp_path / "other")
    content = statement(REVISION, BASE, None)
    signature = signed_by_openssl(private, content)

    assert is_signed(signature, content, [public_key(other), public_key(known)])
    assert not is_signed(signature, content, [public_key(other)])
    assert not is_signed(signature, content, [])


def test_a_link_is_no_signature(tmp_path: Path) -> None:
    """A signature is published with the adapter, and a link could name a private key."""
    private, _ = make_key(tmp_path)
    (tmp_path / "manifest.sig").symlink_to(private)

    assert signature_of(tmp_path) is None


@pytest.mark.parametrize("signature", [None, "", "not base64!", "AAAA", "é"])
def test_nonsense_is_no_signature(tmp_path: Path, signature: str | None) -> None:
    _, public = make_key(tmp_path)

    assert not is_signed(signature, b"content", [public_key(public)])


def test_keys_of_other_kinds_are_refused(tmp_path: Path) -> None:
    private, public = make_key(tmp_path, "rsa")

    for path in (public, private, tmp_path / "nowhere"):
        with pytest.raises(SigningKeyInvalid):
            public_key(path)


def test_a_missing_artifact_is_reported(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["sign", str(tmp_path), "--key", str(tmp_path / "key.pem")])

    assert result.exit_code == 4
    assert "error[artifact_invalid]" in result.stderr
    assert signature_of(tmp_path) is None
