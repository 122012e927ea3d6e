"""The content-addressed store of adapter files: the only place the engine reads adapters from.

    DIR/<revision>/adapter_config.json, adapter_model.safetensors

vLLM re-reads an evicted adapter from its path and dies if the files are gone or reads other weights if they
changed. So a revision's files are written once, never altered, and outlive its last use; before an engine reads them
their digest is taken again, unless nobody has written to them since.

With a bucket the directory is this machine's copy of what all machines share there:

    adapters/<revision>/…          the files
    adapters/<revision>.json       their digests, written last: a revision is there when this is

Beside them, golden/<sha256>.json: what a server of a revision is compared with.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pydantic import TypeAdapter, ValidationError

from convert.artifact import FileDigests, digest, file_digests
from serve.bucket import Bucket
from serve.errors import AdapterUnavailable, ArtifactRefused, StoreUnavailable
from serve.names import AdapterRevision
from serve.objects import Objects, fsync_directory

_COPY_BYTES = 8 << 20
_LISTING = TypeAdapter(FileDigests)

logger = logging.getLogger(__name__)

# Of every file: name, inode, size in bytes, time of the last change in nanoseconds.
_Signature = tuple[tuple[str, int, int, int], ...]
# Writes the content of the named file into a stream.
Source = Callable[[str, BinaryIO], None]


class AdapterStore:
    """Adapter files in a directory, of which a bucket may hold the original. Methods wait for disk and network."""

    def __init__(self, directory: Path, objects: Objects) -> None:
        """`objects`: the place of the catalogue, where the golden answers lie too; a Bucket holds the files as well."""
        self._directory = directory
        self._objects = objects
        self._bucket = objects if isinstance(objects, Bucket) else None
        self._whole: dict[str, _Signature] = {}

    def path(self, adapter: AdapterRevision) -> Path:
        """Where the files of a revision lie on this machine, every byte of them as it was published; brings them here
        once, whoever asks first. Raises AdapterUnavailable if nobody has them, StoreUnavailable if the bucket is out
        of reach."""
        path = self._directory / adapter.revision
        with _told_disk_errors(self._directory):
            if not self._is_whole(path) and self._bucket:
                with self._alone(adapter.revision):
                    if not self._is_whole(path):
                        self._download(self._bucket, adapter)
            if not path.is_dir():
                raise AdapterUnavailable(f"The files of {adapter} are not in the adapter store; publish it again.")
            if not self._is_whole(path):
                raise AdapterUnavailable(f"The files of {adapter} in {path} are damaged; publish it again.")
        return path

    def put(self, revision: str, files: Mapping[str, str], source: Source) -> None:
        """Take files in under the digest of what arrives. Idempotent; appears by one rename, and in the bucket
        by its listing. Raises ArtifactRefused if the bytes are not what `files` says, StoreUnavailable."""
        path = self._directory / revision
        with _told_disk_errors(self._directory):
            if not self._is_whole(path):
                self._write(revision, files, source)
        if self._bucket and self._bucket.read(_listing_key(revision)) is None:
            for name in files:
                self._bucket.upload(f"adapters/{revision}/{name}", path / name)
            self._bucket.create(_listing_key(revision), _LISTING.dump_json(dict(files)))

    def put_golden(self, sha256: str, content: bytes) -> None:
        """Raises ArtifactRefused if the content has another digest."""
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ArtifactRefused("golden.json is not the one that the manifest names; convert or copy it again.")
        self._objects.create(f"golden/{sha256}.json", content)

    def golden(self, sha256: str) -> bytes:
        """Raises AdapterUnavailable if it isn't there or is something else."""
        content = self._objects.read(f"golden/{sha256}.json")
        if content is None or hashlib.sha256(content).hexdigest() != sha256:
            raise AdapterUnavailable(f"The golden answers {sha256[:12]} are not in the store; publish again.")
        return content

    def _download(self, bucket: Bucket, adapter: AdapterRevision) -> None:
        listing = bucket.read(_listing_key(adapter.revision))
        if listing is None:
            return

        def fetch(name: str, stream: BinaryIO) -> None:
            for piece in bucket.pieces(f"adapters/{adapter.revision}/{name}"):
                stream.write(piece)

        try:
            self._write(adapter.revision, _LISTING.validate_json(listing), fetch)
        except (ValidationError, ArtifactRefused) as error:
            raise AdapterUnavailable(
                f"What {bucket.locate('adapters')} holds of {adapter} is damaged: {error}"
            ) from error

    def _write(self, revision: str, files: Mapping[str, str], source: Source) -> None:
        if digest(files) != revision:
            raise ArtifactRefused(f"The revision {revision[:12]} is not the digest of its files; convert it again.")
        self._directory.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=self._directory, prefix=".incoming-"))
        try:
            for name, expected in files.items():
                if _write_durably(temporary / name, name, source) != expected:
                    raise ArtifactRefused(
                        f"{name} of {revision[:12]} is not the file that its manifest names: its bytes changed. "
                        "Convert or copy it again."
                    )
            temporary.chmod(0o755)
            self._put_in_place(temporary, self._directory / revision)
            fsync_directory(self._directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _put_in_place(self, temporary: Path, path: Path) -> None:
        if path.is_dir() and not self._is_whole(path):
            logger.warning("replacing damaged files", extra={"event": "adapter damaged", "path": str(path)})
            aside = Path(tempfile.mkdtemp(dir=self._directory, prefix=".damaged-"))
            path.rename(aside / path.name)
            temporary.rename(path)
            shutil.rmtree(aside)
        elif not path.is_dir():
            temporary.rename(path)

    def _is_whole(self, path: Path) -> bool:
        """Whether these are the bytes that the directory is named after. Once they were, that nothing was written."""
        if not path.is_dir():
            return False
        signature = _signature(path)
        if self._whole.get(path.name) != signature:
            if digest(file_digests(path)) != path.name:
                return False
            self._whole[path.name] = signature
        return True

    @contextmanager
    def _alone(self, revision: str) -> Iterator[None]:
        """One process of this machine at a time; a lock of the system ends with its process."""
        self._directory.mkdir(parents=True, exist_ok=True)
        with (self._directory / f".{revision}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _signature(path: Path) -> _Signature:
    found = ((it.name, it.stat()) for it in sorted(path.iterdir()))
    return tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found)


class _HashingStream:
    """Hashes what passes on its way to the disk."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.sha256 = hashlib.sha256()

    def write(self, piece: bytes) -> int:
        self.sha256.update(piece)
        return self._stream.write(piece)


def _write_durably(path: Path, name: str, source: Source) -> str:
    """The SHA-256 of what `source` gave."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        hashing = _HashingStream(stream)
        source(name, hashing)  # type: ignore[arg-type]  # all that a source does is write
        stream.flush()
        os.fsync(stream.fileno())
    return hashing.sha256.hexdigest()


def copy_from(directory: Path) -> Source:
    """Files of a directory; a symbolic link in the file's place is an OSError."""

    def copy(name: str, stream: BinaryIO) -> None:
        descriptor = os.open(directory / name, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "rb") as file:
            shutil.copyfileobj(file, stream, _COPY_BYTES)

    return copy


def _listing_key(revision: str) -> str:
    return f"adapters/{revision}.json"


@contextmanager
def _told_disk_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreUnavailable(
            f"Can't keep the adapter in {directory}: {error.strerror or error}. Free space or grant access, "
            "then try again."
        ) from error
