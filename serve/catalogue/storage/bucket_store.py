"""Catalogue and adapters in S3, Google Cloud Storage or Azure Blob Storage, so that several machines share them.

This is the only importer of obstore. Credentials, region and endpoint come from the environment variables and instance
roles that the clouds' own tools read (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS,
AZURE_STORAGE_ACCOUNT_NAME, …); Graft never writes them down.
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

_CHUNK_BYTES = 8 << 20
# A caller of the admin API waits for the retries: they bridge a short outage, and end while the caller still waits.
_RETRIES, _RETRY_TIMEOUT = 3, timedelta(seconds=10)


class BucketStore:
    """`serve.catalogue.storage.object_store.ObjectStore` in a bucket, which takes large files as well."""

    def __init__(self, url: str) -> None:
        """Sends no request. Raises StateInvalid if `url` is not SCHEME://BUCKET/PREFIX with one of SCHEMES."""
        self._url = url.rstrip("/")
        try:
            # from_url is typed as a union of which not every member is an obstore ObjectStore.
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
        with self._store_errors("write", key):
            try:
                obstore.put(self._store, key, content, mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
            return True

    def read(self, key: str) -> bytes | None:
        with self._store_errors("read", key):
            try:
                return bytes(obstore.get(self._store, key).bytes())
            except FileNotFoundError:
                return None

    def names(self, prefix: str, after: str = "") -> list[str]:
        with self._store_errors("list", prefix):
            offset = f"{prefix}/{after}" if after else None  # the store begins there, so that a long log costs one page
            pages = obstore.list(self._store, prefix=f"{prefix}/", offset=offset)
            names = (item["path"].removeprefix(f"{prefix}/") for page in pages for item in page)
            return sorted(name for name in names if "/" not in name)

    def delete(self, key: str) -> None:
        with self._store_errors("remove", key):
            obstore.delete(self._store, key)

    def locate(self, key: str) -> str:
        return f"{self._url}/{key}"

    def upload(self, key: str, source: Path) -> None:
        """Write a file under a key that names its content, so that every writer of the key writes the same bytes."""
        with self._store_errors("write", key):
            obstore.put(self._store, key, source)

    def stream(self, key: str) -> Iterator[bytes]:
        """The object in chunks of about 8 MiB. Raises StoreUnavailable, also if there is no such object."""
        with self._store_errors("read", key):
            for chunk in obstore.get(self._store, key).stream(min_chunk_size=_CHUNK_BYTES):
                yield bytes(chunk)

    @contextmanager
    def _store_errors(self, verb: str, key: str) -> Iterator[None]:
        """Raises errors of obstore as StoreUnavailable."""
        try:
            yield
        except (BaseError, OSError, ValueError) as error:
            raise StoreUnavailable(
                f"Can't {verb} {self.locate(key)}: {_first_line(error)}. Loaded adapters are still served; try again."
            ) from error


def _is_http_allowed() -> bool:
    """Whether AWS_ALLOW_HTTP allows http:// endpoints. obstore itself reads this variable only if it gets no client
    options."""
    return os.environ.get("AWS_ALLOW_HTTP", "").lower() == "true"


def _first_line(error: Exception) -> str:
    """The message without the dump of internals after it, which may quote secrets of the request."""
    return (str(error).strip() or repr(error)).splitlines()[0]
