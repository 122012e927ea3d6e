"""Keys of callers: who may use which models, within which limits, until when. They are read from a file that may change
while the server runs.

The secret of a key is 256 random bits behind a prefix that secret scanners can look for; the file holds its SHA-256. A
password needs a slow hash, because people choose passwords that others can guess. Nobody can guess 256 random bits, so
a fast hash is enough. It adds a microsecond to a request.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from convert.artifact import problems_of
from serve.errors import KeysInvalid
from serve.settings import Grant, SecretDigest

PREFIX = "graft-"
_POLL_S = 1.0

logger = logging.getLogger(__name__)

KeyId = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


class _StrictModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Secret(_StrictModel):
    """The digest of what a caller sends to use a key. While a key is rotated it has two valid secrets."""

    sha256: SecretDigest
    expires: AwareDatetime | None = None


class Key(Grant):
    """One caller: its secrets, and its grant."""

    id: KeyId
    secrets: tuple[Secret, ...]
    expires: AwareDatetime | None = None


class KeyFile(_StrictModel):
    """The content of a file of keys."""

    version: Annotated[int, Field(ge=1, le=1)] = 1
    keys: tuple[Key, ...] = ()

    @model_validator(mode="after")
    def _unique_ids_and_digests(self) -> KeyFile:
        ids = [key.id for key in self.keys]
        digests = [secret.sha256 for key in self.keys for secret in key.secrets]
        if len(set(ids)) < len(ids) or len(set(digests)) < len(digests):
            raise ValueError("two keys have the same id or the same sha256")
        return self

    @classmethod
    def read(cls, path: Path) -> KeyFile:
        """The validated content of the file. Raises KeysInvalid if the file can't be read, or is not a file of keys."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise KeysInvalid(f"Can't read the keys {path}: {error.strerror}.") from error
        except ValidationError as error:
            # pydantic's own message quotes the input, which may be a secret that someone wrote here by mistake.
            raise KeysInvalid(f"{path} is not a file of keys: {problems_of(error)}.") from None


def new_secret() -> str:
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


@dataclass(frozen=True)
class _KnownSecret:
    key: Key
    sha256: str
    expires_s: float  # since the epoch; inf: never


class KeyRing:
    """The keys of a file, which is read again when it changes.

    The file is checked once a second, and for every unknown secret, so that a new key can be used at once. If the
    changed file is invalid, the previous keys stay in force, and the reason is logged.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        """Raises KeysInvalid: a server that requires keys does not start without them."""
        self._path = path
        self._clock = clock
        self._refused = ""  # why the changed file is not used
        self._version = _file_version(path)
        self._secrets = _by_digest(KeyFile.read(path))
        self._checked_s = clock()

    def find(self, secret: str) -> Key | None:
        """The key of a secret; None if the secret is unknown or has expired.

        The key is looked up by the digest of the secret. A caller that measures the time of the lookup can therefore
        only learn about digests. It can't choose the digest of its guess, and a digest doesn't reveal a secret.
        """
        now = self._clock()
        if now - self._checked_s >= _POLL_S:
            self._reload(now)
        digest = digest_of(secret)
        known = self._secrets.get(digest)
        if known is None:
            self._reload(now)
            known = self._secrets.get(digest)
        if known is None or not hmac.compare_digest(known.sha256, digest) or known.expires_s <= now:
            return None
        return known.key

    def expiries(self) -> dict[str, float]:
        """When the last secret of each key expires, in seconds since the epoch, by key id. Keys that never expire are
        left out."""
        expiries: dict[str, float] = {}
        for known in self._secrets.values():
            expiries[known.key.id] = max(known.expires_s, expiries.get(known.key.id, 0.0))
        return {key_id: expires_s for key_id, expires_s in expiries.items() if expires_s != float("inf")}

    def _reload(self, now: float) -> None:
        """Read the file if it has changed, or could not be read the last time: what was in the way, as a missing
        permission, may be gone without a change of the file."""
        self._checked_s = now
        version = _file_version(self._path)
        if version == self._version:
            self._refused = ""
            return
        try:
            self._secrets = _by_digest(KeyFile.read(self._path))
            logger.info("the keys were read again: %d secrets", len(self._secrets))
            self._version, self._refused = version, ""
        except KeysInvalid as error:
            if not isinstance(error.__cause__, OSError):
                self._version = version
            if str(error) != self._refused:
                logger.error("the changed keys are not used, the previous ones stay in force: %s", error)
            self._refused = str(error)


def _file_version(path: Path) -> tuple[int, int, int] | None:
    """A value that differs once the content of the file has changed, or a symbolic link on its path points to another
    file. None if there is no such file."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ino, stat.st_size


def _by_digest(file: KeyFile) -> dict[str, _KnownSecret]:
    return {
        secret.sha256: _KnownSecret(key, secret.sha256, _expires_s(key, secret))
        for key in file.keys
        for secret in key.secrets
    }


def _expires_s(key: Key, secret: Secret) -> float:
    """When the key or the secret expires, whichever is first, in seconds since the epoch."""
    return min((end.timestamp() for end in (key.expires, secret.expires) if end), default=float("inf"))
