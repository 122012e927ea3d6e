"""Creates, rotates and revokes keys: every change replaces the file of keys as a whole, under a lock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from filelock import FileLock

from serve.callers.keys import Key, KeyFile, Secret, digest_of, new_secret
from serve.catalogue.storage.atomic_files import replace_file
from serve.errors import KeysInvalid


def create(path: Path, build_key: Callable[[tuple[Secret, ...]], Key]) -> str:
    """Add the key that `build_key` returns for its secrets. Returns the new secret, of which only the digest is stored.
    Raises KeysInvalid if the file has a key of that id already, or can't be changed."""
    secret = new_secret()
    key = build_key((Secret(sha256=digest_of(secret)),))
    with _editing(path) as editor:
        if any(existing.id == key.id for existing in editor.keys):
            raise KeysInvalid(f"There is a key {key.id!r} already: rotate it, or revoke it first.")
        editor.keys.append(key)
    return secret


def rotate(path: Path, key_id: str, grace: timedelta) -> str:
    """Give a key a new secret, and return it. The older secrets stay valid for `grace`, or until they expire if that is
    earlier. Raises KeysInvalid if there is no key of that id, or the file can't be changed."""
    secret = new_secret()
    now = datetime.now(UTC)
    with _editing(path) as editor:
        key = editor.find(key_id)
        valid = [old for old in key.secrets if old.expires is None or old.expires > now]
        ending = [old.model_copy(update={"expires": min(old.expires or now + grace, now + grace)}) for old in valid]
        secrets = (*ending, Secret(sha256=digest_of(secret)))
        editor.replace(key, key.model_copy(update={"secrets": secrets}))
    return secret


def revoke(path: Path, key_id: str) -> None:
    """Remove a key. Raises KeysInvalid if there is no key of that id, or the file can't be changed."""
    with _editing(path) as editor:
        editor.keys.remove(editor.find(key_id))


class _KeyEditor:
    """The keys of a file while they are changed."""

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
def _editing(path: Path) -> Iterator[_KeyEditor]:
    """Lock the file, read it, and replace it when the block ends. The file is unchanged if the block raises."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", fallback_to_soft=False):
            editor = _KeyEditor(path)
            yield editor
            file = KeyFile(keys=tuple(editor.keys))
            replace_file(path, file.model_dump_json(indent=2, exclude_defaults=True).encode())
    except OSError as error:
        raise KeysInvalid(f"Can't write the keys {path}: {error.strerror}.") from error
