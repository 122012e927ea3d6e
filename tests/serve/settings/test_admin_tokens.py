"""Admin tokens in files, as operators, mounted Secrets and full disks leave them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from pydantic import ValidationError
from starlette.requests import Request

from serve.admin.routes import Admin
from serve.callers.keys import Secret
from serve.catalogue.state_dir import StateDir
from serve.errors import StateInvalid, Unauthorized
from serve.settings import GatewaySettings
from serve.settings.admin_tokens import MIN_CHARACTERS, sha256, token_digests

SHORT = "x" * (MIN_CHARACTERS - 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (SHORT.encode(), f"has fewer than {MIN_CHARACTERS} characters"),
        (b"\xff" * 64, "is not text"),
    ],
    ids=["empty", "blank", "short", "bytes"],
)
def test_a_file_without_a_usable_token_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "good.token").write_text("x" * MIN_CHARACTERS)
    (tmp_path / "ci.token").write_bytes(content)

    with pytest.raises(StateInvalid, match=rf"ci\.token {message}") as refused:
        token_digests(tmp_path)

    assert SHORT not in str(refused.value)


def test_a_token_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "ci.token").mkdir()

    with pytest.raises(StateInvalid, match=r"Can't read the admin token .*ci\.token"):
        token_digests(tmp_path)


def test_an_empty_admin_token_is_neither_used_nor_replaced(tmp_path: Path) -> None:
    """A client must not take it for the token, and a server must not start with another one than its clients have."""
    (tmp_path / "admin.token").touch()

    for read in (StateDir(tmp_path).admin_token, StateDir(tmp_path).admin_tokens):
        with pytest.raises(StateInvalid, match=r"admin\.token is empty"):
            read()


def test_no_digest_of_an_empty_secret_is_configured() -> None:
    empty = sha256("")

    with pytest.raises(ValidationError, match="SHA-256 of an empty text"):
        GatewaySettings(admin_tokens={"admin": empty})
    with pytest.raises(ValidationError, match="SHA-256 of an empty text"):
        Secret(sha256=empty)


@pytest.mark.parametrize("header", [b"Bearer", b"Bearer ", b"bearer", b""])
def test_an_empty_token_is_nobody_whatever_is_configured(header: bytes) -> None:
    unused = dict.fromkeys(field.name for field in dataclasses.fields(Admin))
    admin = Admin(**{**unused, "tokens": {"admin": sha256("")}})  # type: ignore[arg-type]
    request = Request({"type": "http", "headers": [(b"authorization", header)]})

    with pytest.raises(Unauthorized):
        admin.caller(request)
