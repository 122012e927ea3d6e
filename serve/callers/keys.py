"""Keys of callers: who may use which models, within which limits, until when. A file that is followed while it changes.

A key is 256 random bits behind a prefix that secret scanners can look for, and the file holds its SHA-256. A slow hash
protects what people choose, because that can be guessed; nobody guesses 256 random bits, so a fast one is enough here,
and it costs a request a microsecond.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from convert.artifact import Sha256, problems_of
from serve.errors import KeysInvalid

PREFIX = "graft-"
_POLL_S = 1.0

logger = logging.getLogger(__name__)

KeyId = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Allowance(_Entry):
    """What a caller may use; nothing said means no limit."""

    requests_per_minute: PositiveInt | None = None
    tokens_per_minute: PositiveInt | None = Field(None, description="Prompt and completion together.")
    concurrent_requests: PositiveInt | None = None

    @property
    def is_unlimited(self) -> bool:
        return self == _UNLIMITED


_UNLIMITED = Allowance()


class Secret(_Entry):
    """One string that stands for a key; a key has two of them while it is rotated."""

    sha256: Sha256
    expires: AwareDatetime | None = None


class Grant(_Entry):
    """What a caller may do."""

    models: tuple[str, ...] = Field(("*",), description="Patterns of names; * and ? as in a shell.")
    admin: bool = Field(False, description="May use the admin API.")
    limits: Allowance = Field(_UNLIMITED, description="For everything that it asks.")
    limits_per_model: dict[str, Allowance] = Field(
        {}, description="Pattern → what it may ask of each model of that name by itself; the first that fits holds."
    )

    def may_use(self, model: str) -> bool:
        return any(fnmatchcase(model, pattern) for pattern in self.models)

    def limits_of(self, model: str) -> Allowance:
        """What it may ask of that one model."""
        fit = (limits for pattern, limits in self.limits_per_model.items() if fnmatchcase(model, pattern))
        return next(fit, _UNLIMITED)


class Key(Grant):
    """One caller."""

    id: KeyId
    secrets: tuple[Secret, ...]
    expires: AwareDatetime | None = None


class KeyFile(_Entry):
    """The document."""

    version: Annotated[int, Field(ge=1, le=1)] = 1
    keys: tuple[Key, ...] = ()

    @model_validator(mode="after")
    def _no_doubles(self) -> KeyFile:
        ids = [key.id for key in self.keys]
        digests = [secret.sha256 for key in self.keys for secret in key.secrets]
        if len(set(ids)) < len(ids) or len(set(digests)) < len(digests):
            raise ValueError("two keys have the same id or the same sha256")
        return self

    @classmethod
    def read(cls, path: Path) -> KeyFile:
        """Raises KeysInvalid."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise KeysInvalid(f"Can't read the keys {path}: {error.strerror}.") from error
        except ValidationError as error:
            # pydantic would quote the input, and that may be a key that someone wrote here by mistake.
            raise KeysInvalid(f"{path} is not a file of keys: {problems_of(error)}.") from None


def new_secret() -> str:
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


@dataclass(frozen=True)
class _Known:
    key: Key
    sha256: str
    expires_s: float


class KeyRing:
    """The keys of a file, as it is now.

    The file is looked at once a second, and whenever a key is unknown, so that one that was just written is good at
    once. A new file that can't be used changes nothing: the keys before it stay good, and the log says why.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        """Raises KeysInvalid: a server that shall know its callers does not start without."""
        self._path = path
        self._clock = clock
        self._signature = _signature(path)
        self._known = _index(KeyFile.read(path))
        self._looked_s = clock()

    def find(self, secret: str) -> Key | None:
        """The key behind what a caller sent; None if it is unknown or has expired.

        What is looked up is a digest: a caller that measures how long this takes learns about digests, which it can't
        choose, and nothing about keys.
        """
        now = self._clock()
        if now - self._looked_s >= _POLL_S:
            self._look(now)
        digest = digest_of(secret)
        known = self._known.get(digest)
        if known is None:
            self._look(now)
            known = self._known.get(digest)
        if known is None or not hmac.compare_digest(known.sha256, digest) or known.expires_s <= now:
            return None
        return known.key

    def expiries(self) -> dict[str, float]:
        """Of keys that expire: when no secret of theirs is good any more, in seconds since the epoch, by their id."""
        ends: dict[str, float] = {}
        for known in self._known.values():
            ends[known.key.id] = max(known.expires_s, ends.get(known.key.id, 0.0))
        return {name: end for name, end in ends.items() if end != float("inf")}

    def _look(self, now: float) -> None:
        self._looked_s = now
        signature = _signature(self._path)
        if signature == self._signature:
            return
        self._signature = signature
        try:
            self._known = _index(KeyFile.read(self._path))
            logger.info("the keys were read again: %d", len(self._known))
        except KeysInvalid as error:
            logger.error("the keys before stay in force: %s", error)


def _signature(path: Path) -> tuple[int, int, int] | None:
    """Changes with the file's content, also when a symbolic link on the way to it is turned."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


def _index(file: KeyFile) -> dict[str, _Known]:
    return {
        secret.sha256: _Known(key, secret.sha256, _first_end(key, secret))
        for key in file.keys
        for secret in key.secrets
    }


def _first_end(key: Key, secret: Secret) -> float:
    """Seconds since the epoch."""
    return min((end.timestamp() for end in (key.expires, secret.expires) if end), default=float("inf"))
