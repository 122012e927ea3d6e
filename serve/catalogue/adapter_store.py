"""The content-addressed store of adapter files: the only place the engine reads adapters from.

    DIR/<revision>/adapter_config.json, adapter_model.safetensors

vLLM reads an evicted adapter again from its path: it dies if the files are gone, and serves other weights if the files
changed. So the files of a revision are written once, never changed, and kept after its last use. Before an engine reads
them, their digest is computed again, unless they were not written to since the last time.

If a bucket holds the state, the directory is this machine's copy of these objects, which all machines share:

    adapters/<revision>/…          the files
    adapters/<revision>.json       the listing: their digests. It is written last, so a revision exists if it does.

Copies that nobody on this machine uses are removed when all take more than `max_bytes` (`local_copies`); the bucket has
them still. Without a bucket nothing is removed: these files are the only ones.

The object golden/<sha256>.json beside them holds golden answers, which a server of a revision is compared with.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock
from pydantic import TypeAdapter, ValidationError

from convert.artifact import FileDigests, digest, file_digests
from convert.artifact.durable_files import sync
from serve.catalogue.storage.atomic_files import Source, write_hashed
from serve.catalogue.storage.bucket_store import BucketStore
from serve.catalogue.storage.local_copies import LocalCopies
from serve.catalogue.storage.object_store import ObjectStore
from serve.errors import AdapterUnavailable, ArtifactRefused, StoreUnavailable
from serve.names import AdapterRevision
from serve.settings import LOCAL_ADAPTER_BYTES

_COPY_BYTES = 8 << 20
_LISTING = TypeAdapter(FileDigests)

logger = logging.getLogger(__name__)

# Of every file: name, inode, size in bytes, time of the last change in nanoseconds.
_FileStats = tuple[tuple[str, int, int, int], ...]


class AdapterStore:
    """Adapter files in a directory, which may be a cache of a bucket. Methods block on disk and network."""

    def __init__(self, directory: Path, objects: ObjectStore, max_bytes: int = LOCAL_ADAPTER_BYTES) -> None:
        """`objects`: the store of the catalogue, which holds the golden answers too; a BucketStore also holds the
        adapter files, and the directory at most `max_bytes` of them beside those in use."""
        self._directory = directory
        self._max_bytes = max_bytes
        self._objects = objects
        self._bucket = objects if isinstance(objects, BucketStore) else None
        self._copies = LocalCopies(directory) if self._bucket else None
        self._wanted: frozenset[str] = frozenset()
        self._intact: dict[str, _FileStats] = {}  # by revision, as of the last check that succeeded

    def path(self, adapter: AdapterRevision) -> Path:
        """The directory of a revision's files on this machine, which are byte for byte as published. The first call
        downloads them from the bucket. Raises AdapterUnavailable if the files are missing or damaged, StoreUnavailable
        if the disk fails or the bucket can't be reached."""
        with self._used(adapter.revision):
            return self._path(adapter)

    def hold(self, adapter: AdapterRevision) -> Path:
        """Like `path`, and the files stay until a `release` for each `hold`."""
        if self._copies:
            with _disk_errors(self._directory):
                self._copies.begin_use(adapter.revision)
        try:
            return self.path(adapter)
        except BaseException:
            self.release(adapter)
            raise

    def release(self, adapter: AdapterRevision) -> None:
        """End one `hold`. Never blocks."""
        if self._copies:
            self._copies.end_use(adapter.revision)

    @contextmanager
    def held(self, adapter: AdapterRevision) -> Iterator[Path]:
        """`hold` until the block ends."""
        path = self.hold(adapter)
        try:
            yield path
        finally:
            self.release(adapter)

    def want(self, adapters: Set[AdapterRevision]) -> None:
        """From now on copies of other revisions are removed before those of these."""
        self._wanted = frozenset(adapter.revision for adapter in adapters)

    def _path(self, adapter: AdapterRevision) -> Path:
        path = self._directory / adapter.revision
        if self._bucket and not self._is_intact(path):
            with self._revision_lock(adapter.revision):
                if not self._is_intact(path):  # no other process downloaded it while this one waited
                    self._download(self._bucket, adapter)
            self._remove_surplus()
        if not path.is_dir():
            raise AdapterUnavailable(f"The files of {adapter} are not in the adapter store; publish it again.")
        if not self._is_intact(path):
            raise AdapterUnavailable(f"The files of {adapter} in {path} are damaged; publish it again.")
        return path

    def put(self, revision: str, files: Mapping[str, str], source: Source) -> None:
        """Store a revision: `files` has the SHA-256 of each file by name. Idempotent. The directory appears by one
        rename, and in the bucket the listing is written last. Raises ArtifactRefused if the bytes have other digests,
        StoreUnavailable."""
        path = self._directory / revision
        with self._used(revision):
            if not self._is_intact(path):
                self._write(revision, files, source)
            if self._bucket and self._bucket.read(_listing_key(revision)) is None:
                for name in files:
                    self._bucket.upload(f"adapters/{revision}/{name}", path / name)
                self._bucket.create(_listing_key(revision), _LISTING.dump_json(dict(files)))
        self._remove_surplus()

    def put_golden(self, sha256: str, content: bytes) -> None:
        """Store golden answers. Raises ArtifactRefused if the content has another digest, StoreUnavailable."""
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ArtifactRefused("golden.json is not the one that the manifest names; convert or copy it again.")
        self._objects.create(f"golden/{sha256}.json", content)

    def golden(self, sha256: str) -> bytes:
        """The golden answers of this digest. Raises AdapterUnavailable if they are missing or damaged,
        StoreUnavailable."""
        content = self._objects.read(f"golden/{sha256}.json")
        if content is None or hashlib.sha256(content).hexdigest() != sha256:
            raise AdapterUnavailable(f"The golden answers {sha256[:12]} are not in the store; publish again.")
        return content

    def _download(self, bucket: BucketStore, adapter: AdapterRevision) -> None:
        """Does nothing if the bucket lacks the revision. Raises AdapterUnavailable if its files there are damaged."""
        listing = bucket.read(_listing_key(adapter.revision))
        if listing is None:
            return

        def fetch(name: str, stream: BinaryIO) -> None:
            for chunk in bucket.stream(f"adapters/{adapter.revision}/{name}"):
                stream.write(chunk)

        try:
            self._write(adapter.revision, _LISTING.validate_json(listing), fetch)
        except (ValidationError, ArtifactRefused) as error:
            raise AdapterUnavailable(
                f"The files of {adapter} in {bucket.locate('adapters')} are damaged: {error}"
            ) from error

    def _write(self, revision: str, files: Mapping[str, str], source: Source) -> None:
        """Write all files of a revision into a new directory, check their digests, and move it into place."""
        if digest(files) != revision:
            raise ArtifactRefused(f"The revision {revision[:12]} is not the digest of its files; convert it again.")
        self._directory.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=self._directory, prefix=f".incoming-{revision}-"))
        try:
            for name, expected_sha256 in files.items():
                if write_hashed(temporary / name, name, source) != expected_sha256:
                    raise ArtifactRefused(
                        f"{name} of {revision[:12]} is not the file that its manifest names: its bytes changed. "
                        "Convert or copy it again."
                    )
            temporary.chmod(0o755)
            self._move_into_place(temporary, self._directory / revision)
            sync(self._directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _move_into_place(self, temporary: Path, path: Path) -> None:
        """Rename the new directory to `path`. An intact one that another process put there first stays."""
        if not path.is_dir():
            temporary.rename(path)
        elif not self._is_intact(path):
            logger.warning("replacing damaged files", extra={"event": "adapter damaged", "path": str(path)})
            damaged = Path(tempfile.mkdtemp(dir=self._directory, prefix=f".damaged-{path.name}-"))
            path.rename(damaged / path.name)
            temporary.rename(path)
            shutil.rmtree(damaged)

    def _is_intact(self, path: Path) -> bool:
        """Whether the files have the digest that their directory is named after. Files that were not written to since
        the last check are not read again."""
        if not path.is_dir():
            return False
        stats = _file_stats(path)
        if self._intact.get(path.name) != stats:
            if digest(file_digests(path)) != path.name:
                return False
            self._intact[path.name] = stats
        return True

    def _remove_surplus(self) -> None:
        if self._copies:
            self._copies.remove_surplus(self._max_bytes, self._wanted)

    @contextmanager
    def _used(self, revision: str) -> Iterator[None]:
        """The files stay until the block ends. Raises OSError as StoreUnavailable."""
        with _disk_errors(self._directory), self._copies.use(revision) if self._copies else nullcontext():
            yield

    def _revision_lock(self, revision: str) -> FileLock:
        """Held by one thread of one process of this machine at a time. The system releases it if the process dies."""
        self._directory.mkdir(parents=True, exist_ok=True)
        return FileLock(self._directory / f".{revision}.lock", fallback_to_soft=False)


def _file_stats(path: Path) -> _FileStats:
    stats = ((file.name, file.stat()) for file in sorted(path.iterdir()))
    return tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def copy_from(directory: Path) -> Source:
    """The files of a directory as a Source; it raises OSError for a symbolic link, which could point anywhere."""

    def copy(name: str, stream: BinaryIO) -> None:
        descriptor = os.open(directory / name, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "rb") as file:
            shutil.copyfileobj(file, stream, _COPY_BYTES)

    return copy


def _listing_key(revision: str) -> str:
    return f"adapters/{revision}.json"


@contextmanager
def _disk_errors(directory: Path) -> Iterator[None]:
    """Raises OSError as StoreUnavailable."""
    try:
        yield
    except OSError as error:
        raise StoreUnavailable(
            f"Can't keep the adapter in {directory}: {error.strerror or error}. Free space or grant access, "
            "then try again."
        ) from error
