"""Publishing an artifact: it is written beside its destination and appears by one rename, or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from convert.artifact import MANIFEST, Artifact, Manifest, file_sha256
from convert.errors import OutputBusy, OutputExists, OutputUnwritable
from convert.files import sync
from convert.journal import Journal


def require_absent(destination: Path) -> None:
    """Raises OutputExists. Nothing is ever overwritten: someone may be serving from it."""
    if destination.exists() or destination.is_symlink():
        raise OutputExists(f"{destination} is already there. Choose another --out, or remove it first.")


class ArtifactWriter:
    """A hidden directory `.NAME.partial` beside the destination, locked while it is being written.

    `making` is the identity of the conversion (`journal.identity`): what an earlier process of the same identity
    finished and left there is kept, anything else that lies there is removed. None: nothing is kept.

    Leaving the context without `publish` removes the directory: an error, a failed quality gate and Ctrl-C leave
    nothing behind. Only SystemExit, which is how a supervisor's SIGTERM arrives, keeps what is finished, as kill -9
    and a power cut do: whoever stops a conversion that way starts it again.
    """

    def __init__(self, destination: Path, making: str | None = None) -> None:
        require_absent(destination)
        self.destination = destination
        self.root = partial(destination)
        self._making = making
        self._lock: int | None = None

    def __enter__(self) -> Self:
        try:
            self._lock = self._locked_root()
            self.journal = Journal.open(self.root, self._making)
        except OSError as error:
            raise OutputUnwritable(f"{self.destination.parent} can't be written to: {error.strerror}.") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not (isinstance(error, SystemExit) and not self.journal.is_empty):
            shutil.rmtree(self.root, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
        if isinstance(error, OSError):
            raise OutputUnwritable(f"{self.destination} could not be written: {error}.") from error

    def directory(self, name: str) -> Path:
        """A directory of the artifact, `model` or `adapter`. What is in it are finished files of the journal."""
        path = self.root / name
        path.mkdir(exist_ok=True)
        return path

    def digests(self, name: str) -> dict[str, str]:
        """SHA-256 of every file of such a directory, by path in it; those in the journal are not read again."""
        directory = self.root / name
        files = (path for path in sorted(directory.rglob("*")) if path.is_file())
        return {
            path.relative_to(directory).as_posix(): self.journal.sha256(path) or file_sha256(path) for path in files
        }

    def publish(self, manifest: Manifest) -> Artifact:
        """Write the manifest, make everything durable, and rename."""
        write_json(self.root / MANIFEST, manifest.model_dump(mode="json", by_alias=True))
        for directory in [path for path in self.root.rglob("*") if path.is_dir()] + [self.root]:
            sync(directory)
        require_absent(self.destination)
        self.journal.remove()
        self.root.rename(self.destination)
        sync(self.destination)
        sync(self.destination.parent)
        return Artifact.open(self.destination)

    def _locked_root(self) -> int:
        """Raises OutputBusy when a living process has it."""
        while True:
            require_absent(self.destination)
            self.root.mkdir(parents=True, exist_ok=True)
            lock = _lock(self.root)
            if lock is None:
                raise OutputBusy(
                    f"Another process is writing {self.destination}. Wait until it is done, or choose another --out."
                )
            if _is_at(lock, self.root):
                return lock
            os.close(lock)  # its owner published or removed it since it was opened


def partial(destination: Path) -> Path:
    """Where an artifact lies until it is published."""
    return destination.parent / f".{destination.name}.partial"


def write_json(path: Path, document: Mapping[str, object]) -> None:
    """Readable JSON, durable when this returns."""
    _durably(path, lambda: (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())


def copy_file(source: Path, directory: Path) -> None:
    """The same bytes under the same name, durable when this returns."""
    _durably(directory / source.name, source.read_bytes)


def _durably(path: Path, content: Callable[[], bytes]) -> None:
    with path.open("xb") as stream:
        stream.write(content())
        stream.flush()
        os.fsync(stream.fileno())


def _lock(directory: Path) -> int | None:
    """A descriptor that holds the directory's lock; None when a living process has it."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
