"""Publishing an artifact: it is written beside its destination and appears by one rename, or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping
from glob import escape
from pathlib import Path
from types import TracebackType
from typing import Self

from convert.artifact import MANIFEST, Artifact, Manifest
from convert.errors import OutputExists, OutputUnwritable


def require_absent(destination: Path) -> None:
    """Raises OutputExists. Nothing is ever overwritten: someone may be serving from it."""
    if destination.exists() or destination.is_symlink():
        raise OutputExists(f"{destination} is already there. Choose another --out, or remove it first.")


class ArtifactWriter:
    """A hidden directory `.NAME.partial-PID` beside the destination, locked while it is being written.

    Leaving the context without `publish` removes it. A killed process can't: the next writer for the same destination
    removes what it left, which it knows by the lock that died with its owner.
    """

    def __init__(self, destination: Path) -> None:
        require_absent(destination)
        self.destination = destination
        self.root = destination.parent / f".{destination.name}.partial-{os.getpid()}"
        self._lock: int | None = None

    def __enter__(self) -> Self:
        try:
            self._remove_abandoned()
            self.root.mkdir(parents=True)
            self._lock = _lock(self.root)
        except OSError as error:
            raise OutputUnwritable(f"{self.destination.parent} can't be written to: {error.strerror}.") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
        if isinstance(error, OSError):
            raise OutputUnwritable(f"{self.destination} could not be written: {error}.") from error

    def directory(self, name: str) -> Path:
        """A new directory of the artifact, `model` or `adapter`."""
        path = self.root / name
        path.mkdir()
        return path

    def publish(self, manifest: Manifest) -> Artifact:
        """Write the manifest, make everything durable, and rename."""
        write_json(self.root / MANIFEST, manifest.model_dump(mode="json", by_alias=True))
        for directory in [path for path in self.root.rglob("*") if path.is_dir()] + [self.root]:
            _sync(directory)
        require_absent(self.destination)
        self.root.rename(self.destination)
        _sync(self.destination.parent)
        return Artifact.open(self.destination)

    def _remove_abandoned(self) -> None:
        for path in self.destination.parent.glob(f".{escape(self.destination.name)}.partial-*"):
            lock = _lock(path)
            if lock is not None:
                shutil.rmtree(path)
                os.close(lock)


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


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
