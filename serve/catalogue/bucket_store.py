"""S3, Google Cloud Storage or Azure Blob Storage as the place where servers share catalogue and adapters.

The only importer of obstore. Credentials, region and endpoint come from the environment variables and instance
roles that the clouds' own tools read (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS,
AZURE_STORAGE_ACCOUNT_NAME, …); none is ever written down here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import ObjectStore, from_url

from serve.errors import StateInvalid, StoreUnavailable

SCHEMES = ("s3", "gs", "az", "abfs", "abfss")

_PIECE_BYTES = 8 << 20
# A caller of the admin API waits for this: long enough for a hiccup, short enough to be told.
_RETRIES, _RETRY_TIMEOUT = 3, timedelta(seconds=10)


class Bucket:
    """serve.objects.Objects on an object store, and larger files in pieces."""

    def __init__(self, url: str) -> None:
        """No request is made. Raises StateInvalid if the URL is none of a known store."""
        self._url = url.rstrip("/")
        try:
            # Not every part of the union that from_url returns is an ObjectStore by its type.
            self._store: ObjectStore = from_url(
                self._url,
                client_options={"timeout": "30s", "connect_timeout": "3s", "allow_http": _is_http_allowed()},
                retry_config={"max_retries": _RETRIES, "retry_timeout": _RETRY_TIMEOUT},
            )
        except (BaseError, ValueError) as error:
            raise StateInvalid(
                f"Can't use {url} as the place of the state: {_first_line(error)}. "
                f"Expected a directory, or SCHEME://BUCKET/PREFIX with one of: {', '.join(SCHEMES)}."
            ) from error

    def create(self, key: str, content: bytes) -> bool:
        with self._told("write", key):
            try:
                obstore.put(self._store, key, content, mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
            return True

    def read(self, key: str) -> bytes | None:
        with self._told("read", key):
            try:
                return bytes(obstore.get(self._store, key).bytes())
            except FileNotFoundError:
                return None

    def names(self, prefix: str) -> list[str]:
        with self._told("list", prefix):
            listed = obstore.list_with_delimiter(self._store, prefix=f"{prefix}/")
            return sorted(it["path"].rpartition("/")[2] for it in listed["objects"])

    def delete(self, key: str) -> None:
        with self._told("remove", key):
            obstore.delete(self._store, key)

    def locate(self, key: str) -> str:
        return f"{self._url}/{key}"

    def upload(self, key: str, source: Path) -> None:
        """A file under a key that names its content: whoever else writes it writes the same."""
        with self._told("write", key):
            obstore.put(self._store, key, source)

    def pieces(self, key: str) -> Iterator[bytes]:
        """The content of an object in pieces. Raises StoreUnavailable, also if it is not there."""
        with self._told("read", key):
            for piece in obstore.get(self._store, key).stream(min_chunk_size=_PIECE_BYTES):
                yield bytes(piece)

    @contextmanager
    def _told(self, verb: str, key: str) -> Iterator[None]:
        try:
            yield
        except (BaseError, OSError, ValueError) as error:
            raise StoreUnavailable(
                f"Can't {verb} {self.locate(key)}: {_first_line(error)}. What is resident is served on; try again."
            ) from error


def _is_http_allowed() -> bool:
    """obstore looks for this variable only where no options are given."""
    return os.environ.get("AWS_ALLOW_HTTP", "").lower() == "true"


def _first_line(error: Exception) -> str:
    """Without the dump of internals that follows, which may hold more of the request than is good."""
    return (str(error).strip() or repr(error)).splitlines()[0]
