from __future__ import annotations

import errno
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from serve.callers import key_admin
from serve.callers.keys import PREFIX, Key, KeyFile, KeyRing, Secret, digest_of
from serve.cli.app import app
from serve.errors import KeysInvalid
from serve.settings import Allowance


class Clock:
    """A clock that a test sets, in seconds since the epoch."""

    def __init__(self) -> None:
        self.now_s = datetime.now(UTC).timestamp()

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def clock() -> Clock:
    return Clock()


def add(path: Path, key_id: str, **fields: object) -> str:
    return key_admin.create(path, lambda secrets: Key.model_validate({"id": key_id, "secrets": secrets, **fields}))


def key_id(ring: KeyRing, secret: str) -> str | None:
    key = ring.find(secret)
    return key.id if key else None


def test_a_key_is_found_by_what_was_shown_once_and_by_nothing_else(path: Path) -> None:
    secret = add(path, "team-a")

    ring = KeyRing(path)

    assert key_id(ring, secret) == "team-a"
    for wrong in ("", secret[:-1], secret + "x", secret.upper(), digest_of(secret), "\udcff"):
        assert ring.find(wrong) is None
    assert secret.startswith(PREFIX)
    assert secret.removeprefix(PREFIX) not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0


def test_two_keys_are_never_the_same(path: Path) -> None:
    assert len({add(path, f"team-{number}") for number in range(20)}) == 20


def test_a_new_key_is_good_at_once_though_the_file_is_polled(path: Path, clock: Clock) -> None:
    add(path, "team-a")
    ring = KeyRing(path, clock)

    assert key_id(ring, add(path, "team-b")) == "team-b"


def test_a_revoked_key_is_refused_within_a_second(path: Path, clock: Clock) -> None:
    secret = add(path, "team-a")
    ring = KeyRing(path, clock)
    assert key_id(ring, secret) == "team-a"

    key_admin.revoke(path, "team-a")
    clock.now_s += 1

    assert ring.find(secret) is None


def test_both_secrets_are_good_while_a_key_is_rotated(path: Path, clock: Clock) -> None:
    old = add(path, "team-a")
    ring = KeyRing(path, clock)

    new = key_admin.rotate(path, "team-a", timedelta(minutes=10))

    clock.now_s += 2
    assert [key_id(ring, old), key_id(ring, new)] == ["team-a", "team-a"]
    clock.now_s += 600
    assert [key_id(ring, old), key_id(ring, new)] == [None, "team-a"]


def test_rotating_twice_never_makes_an_old_secret_good_for_longer(path: Path, clock: Clock) -> None:
    first = add(path, "team-a")
    key_admin.rotate(path, "team-a", timedelta(minutes=1))
    key_admin.rotate(path, "team-a", timedelta(minutes=60))
    ring = KeyRing(path, clock)

    clock.now_s += 120

    assert ring.find(first) is None


def test_an_expired_key_is_refused(path: Path, clock: Clock) -> None:
    secret = add(path, "team-a", expires=datetime.fromtimestamp(clock.now_s + 60, UTC))
    ring = KeyRing(path, clock)

    assert key_id(ring, secret) == "team-a"
    clock.now_s += 61
    assert ring.find(secret) is None


@pytest.mark.parametrize("broken", ["", "{", '{"keys": [{"id": "team-a"}]}', '{"keys": 3}', None])
def test_a_broken_new_file_leaves_the_keys_before_it(
    path: Path, clock: Clock, broken: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    secret = add(path, "team-a")
    ring = KeyRing(path, clock)

    if broken is None:
        path.unlink()
    else:
        path.write_text(broken)
    clock.now_s += 2

    with caplog.at_level(logging.ERROR):
        assert [key_id(ring, secret) for _ in range(3)] == ["team-a"] * 3
    assert len(caplog.records) == 1, "logged once"
    restored = add(path, "team-b") if broken is None else None
    if restored:
        assert key_id(ring, restored) == "team-b"


def test_keys_that_could_not_be_read_are_read_once_they_can_be_though_the_file_is_the_same(
    path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    old = add(path, "team-a")
    ring = KeyRing(path, clock)

    with pytest.MonkeyPatch.context() as disk, caplog.at_level(logging.ERROR):
        new = add(path, "team-b")
        disk.setattr(Path, "read_bytes", broken_read)
        for _ in range(3):
            clock.now_s += 2
            assert [key_id(ring, old), key_id(ring, new)] == ["team-a", None]
    assert len(caplog.records) == 1, "logged once"

    assert key_id(ring, new) == "team-b"


def broken_read(path: Path) -> bytes:
    raise PermissionError(errno.EACCES, "Permission denied", str(path))


def test_text_in_place_of_a_digest_is_not_shown(path: Path) -> None:
    path.write_text(json.dumps({"keys": [{"id": "team-a", "secrets": [{"sha256": "graft-the-key-itself"}]}]}))

    with pytest.raises(KeysInvalid) as caught:
        KeyFile.read(path)

    assert "graft-the-key-itself" not in str(caught.value)
    assert "sha256" in str(caught.value)


def test_a_server_that_shall_know_its_callers_does_not_start_without_the_file(path: Path) -> None:
    with pytest.raises(KeysInvalid):
        KeyRing(path)


def test_the_swap_of_links_that_kubernetes_makes_is_seen(tmp_path: Path, clock: Clock) -> None:
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
    first, second = add(tmp_path / "1" / "keys.json", "team-a"), add(tmp_path / "2" / "keys.json", "team-b")
    (tmp_path / "..data").symlink_to("1")
    (tmp_path / "keys.json").symlink_to("..data/keys.json")
    ring = KeyRing(tmp_path / "keys.json", clock)
    assert key_id(ring, first) == "team-a"

    (tmp_path / "..new").symlink_to("2")
    (tmp_path / "..new").rename(tmp_path / "..data")
    clock.now_s += 1

    assert [key_id(ring, first), key_id(ring, second)] == [None, "team-b"]


def test_changes_at_once_are_all_there_in_the_end(path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        secrets = list(pool.map(lambda number: add(path, f"team-{number}"), range(40)))

    ring = KeyRing(path)
    assert [key_id(ring, secret) for secret in secrets] == [f"team-{number}" for number in range(40)]


def test_a_file_with_the_same_id_or_secret_twice_is_refused() -> None:
    secrets = (Secret(sha256="a" * 64),)

    with pytest.raises(ValueError, match="same id"):
        KeyFile(keys=(Key(id="a", secrets=secrets), Key(id="b", secrets=secrets)))


def test_patterns_say_what_a_key_may_use_and_the_first_that_fits_its_limits() -> None:
    key = Key(
        id="a",
        secrets=(),
        models=("support-*", "base"),
        limits_per_model={"support-x": Allowance(requests_per_minute=1), "*": Allowance(requests_per_minute=2)},
    )

    assert [key.may_use(name) for name in ("support-x", "support-", "base", "Support-x", "other", "")] == [
        True, True, True, False, False, False
    ]  # fmt: skip
    assert key.limits_of("support-x").requests_per_minute == 1
    assert key.limits_of("base").requests_per_minute == 2


def test_the_command_line_makes_lists_rotates_and_revokes_keys(tmp_path: Path) -> None:
    def said(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["key", *arguments, "--state", str(tmp_path)])
        assert result.exit_code == 0, result.output
        return result.stdout

    secret = said(
        "create", "team-a", "--model", "french", "--tokens-per-minute", "100", "--expires-in-days", "2"
    ).strip()
    listed = json.loads(said("list", "--json"))["keys"]

    assert [(key["id"], key["models"], key["limits"]) for key in listed] == [
        ("team-a", ["french"], {"tokens_per_minute": 100})
    ]
    assert secret not in said("list")
    assert key_id(KeyRing(tmp_path / "keys.json"), secret) == "team-a"
    new = json.loads(said("rotate", "team-a", "--grace-minutes", "0", "--json"))["key"]
    ring = KeyRing(tmp_path / "keys.json")
    assert [key_id(ring, secret), key_id(ring, new)] == [None, "team-a"]
    said("revoke", "team-a")
    assert json.loads(said("list", "--json")) == {"keys": []}


@pytest.mark.parametrize(("verb", "key"), [("create", "team-a"), ("rotate", "nobody"), ("revoke", "nobody")])
def test_a_change_that_makes_no_sense_is_reported(tmp_path: Path, verb: str, key: str) -> None:
    add(tmp_path / "keys.json", "team-a")

    result = CliRunner().invoke(app, ["key", verb, key, "--state", str(tmp_path)])

    assert result.exit_code == 1
    assert "error[keys_invalid]" in result.output


def test_keys_that_nobody_may_write_are_reported_without_a_traceback(tmp_path: Path) -> None:
    if os.getuid() == 0:
        (tmp_path / "keys.json").mkdir()  # not writable by anyone
    else:
        tmp_path.chmod(0o500)

    result = CliRunner().invoke(app, ["key", "create", "a", "--state", str(tmp_path)])

    assert result.exit_code == 1
    assert "error[keys_invalid]" in result.output


def test_when_keys_expire_can_be_asked(path: Path, clock: Clock) -> None:
    soon, later = (datetime.fromtimestamp(clock.now_s + wait_s, UTC) for wait_s in (60, 600))
    add(path, "for-ever")
    add(path, "soon", expires=soon)
    add(path, "later", expires=later)

    assert KeyRing(path, clock).expiries() == {"soon": soon.timestamp(), "later": later.timestamp()}
