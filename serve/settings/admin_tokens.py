"""The admin tokens of a directory: each file LABEL.token holds one."""

from __future__ import annotations

import hashlib
from pathlib import Path

from serve.errors import StateInvalid

# An empty file, as an empty Secret or a full disk leaves it, would make an empty password an administrator's.
MIN_CHARACTERS = 16


def sha256(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def read_token(path: Path) -> str:
    """The token in a file. Raises StateInvalid, which names the file and never its content, if the file can't be read,
    or holds fewer than MIN_CHARACTERS."""
    try:
        token = path.read_text().strip()
    except OSError as error:
        raise StateInvalid(f"Can't read the admin token {path}: {error.strerror}.") from error
    except UnicodeDecodeError:
        raise StateInvalid(f"The admin token {path} is not text.") from None  # the error quotes the content
    if len(token) < MIN_CHARACTERS:
        what = f"has fewer than {MIN_CHARACTERS} characters" if token else "is empty"
        raise StateInvalid(
            f"The admin token {path} {what}: anyone could guess it. Write a token into it "
            f"(openssl rand -hex 32), or remove the file."
        )
    return token


def token_digests(directory: Path) -> dict[str, str]:
    """The SHA-256 of every token of the directory by its label. Raises StateInvalid as `read_token` does."""
    return {path.stem: sha256(read_token(path)) for path in sorted(directory.glob("*.token"))}
