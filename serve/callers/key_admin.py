"""Changes of a file of keys: each replaces it whole, and two at once come one after the other."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from serve.errors import KeysInvalid
from serve.keys import Key, KeyFile, Secret, digest_of, new_secret
from serve.objects import fsync_directory


def create(path: Path, make: Callable[[tuple[Secret, ...]], Key]) -> str:
    """Add a key; returns the secret, which is kept nowhere. Raises KeysInvalid if there is one of that id."""
    secret = new_secret()
    key = make((Secret(sha256=digest_of(secret)),))
    with _changing(path) as change:
        if any(it.id == key.id for it in change.keys):
            raise KeysInvalid(f"There is a key {key.id!r} already: rotate it, or revoke it first.")
        change.keys.append(key)
    return secret


def rotate(path: Path, key_id: str, grace: timedelta) -> str:
    """Give a key a new secret, which is returned; those before it stay good for `grace`."""
    secret = new_secret()
    now = datetime.now(UTC)
    with _changing(path) as change:
        key = change.find(key_id)
        alive = [it for it in key.secrets if it.expires is None or it.expires > now]
        ending = [it.model_copy(update={"expires": min(it.expires or now + grace, now + grace)}) for it in alive]
        secrets = (*ending, Secret(sha256=digest_of(secret)))
        change.replace(key, key.model_copy(update={"secrets": secrets}))
    return secret


def revoke(path: Path, key_id: str) -> None:
    """Raises KeysInvalid if there is none of that id."""
    with _changing(path) as change:
        change.keys.remove(change.find(key_id))


class _Change:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.keys = list(KeyFile.read(path).keys) if path.exists() else []

    def find(self, key_id: str) -> Key:
        for key in self.keys:
            if key.id == key_id:
                return key
        raise KeysInvalid(f"{self._path} holds no key {key_id!r}: `python -m serve key list` shows them.")

    def replace(self, old: Key, new: Key) -> None:
        self.keys[self.keys.index(old)] = new


@contextmanager
def _changing(path: Path) -> Iterator[_Change]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with Path(f"{path}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            change = _Change(path)
            yield change
            _write(path, KeyFile(keys=tuple(change.keys)))
    except OSError as error:
        raise KeysInvalid(f"Can't write the keys {path}: {error.strerror}.") from error


def _write(path: Path, file: KeyFile) -> None:
    """Readable by its owner only, and never half there."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".keys-")
    try:
        with os.fdopen(descriptor, "w") as stream:
            stream.write(file.model_dump_json(indent=2, exclude_defaults=True))
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)
