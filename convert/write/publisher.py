"""Publishing an artifact: it is written beside its destination and appears by one rename, or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Self

from convert.artifact import MANIFEST, Artifact, Manifest, file_sha256
from convert.artifact.durable_files import replace_file, sync
from convert.errors import OutputBusy, OutputExists, OutputUnwritable
from convert.write.files import write_json
from convert.write.journal import Journal


def require_absent(destination: Path) -> None:
    """Raises OutputExists. Nothing is ever overwritten, since a server may read from it."""
    if destination.exists() or destination.is_symlink():
        raise OutputExists(f"{destination} is already there. Choose another --out, or remove it first.")


def finished_before(destination: Path, conversion_ids: Collection[str]) -> Artifact | None:
    """The artifact at the destination if one of these conversions wrote it, and recorded that (`record`).

    Raises ArtifactInvalid if it can't be read.
    """
    try:
        conversion, manifest_sha256 = _record(destination).read_text().split()
        same = conversion in conversion_ids and file_sha256(destination / MANIFEST) == manifest_sha256
    except (OSError, ValueError):
        return None
    return Artifact.open(destination) if same else None


class ArtifactWriter:
    """A hidden directory `.NAME.partial` beside the destination, locked while it is being written.

    `conversion_id` (`journal.conversion_id`): files that an earlier process of the same conversion finished there are
    kept, everything else there is removed. None: nothing is kept. A directory that somebody else put there is refused,
    and no link in it is followed.

    Leaving the context without `publish` removes the directory, so an error, a failed quality gate and Ctrl-C leave
    nothing behind. SystemExit keeps the finished files: a supervisor's SIGTERM arrives as SystemExit, and whoever stops
    a conversion with it starts the conversion again. kill -9 and a power cut leave the directory as it is.
    """

    def __init__(self, destination: Path, conversion_id: str | None = None, *, record: bool = False) -> None:
        """`record`: write down beside the destination which conversion the artifact is of, for `finished_before`."""
        require_absent(destination)
        self._recorded = record
        self.destination = destination
        self.root = partial_directory(destination)
        self._conversion_id = conversion_id
        self._lock: int | None = None

    def __enter__(self) -> Self:
        try:
            self._lock = self._locked_root()
            self.journal = Journal.open(self.root, self._conversion_id)
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
        """The directory `model`, `adapter` or `checkpoint` of the artifact, with the files that the journal kept."""
        path = self.root / name
        path.mkdir(exist_ok=True)
        return path

    def digests(self, name: str) -> dict[str, str]:
        """SHA-256 of every file in such a directory, by its path there. Files in the journal are not read again."""
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
        if self._recorded:  # before the artifact appears: killed in between, a second try would not know it
            line = f"{self._conversion_id} {file_sha256(self.root / MANIFEST)}\n"
            replace_file(_record(self.destination), line.encode())
        self.journal.remove()
        self.root.rename(self.destination)
        sync(self.destination)
        sync(self.destination.parent)
        return Artifact.open(self.destination)

    def _locked_root(self) -> int:
        """Create and lock the directory. Raises OutputBusy while another process has the lock."""
        while True:
            require_absent(self.destination)
            if self.root.is_symlink():
                raise _not_ours(self.root, "is a symbolic link")
            self.root.mkdir(parents=True, exist_ok=True)
            lock = _lock(self.root)
            if lock is None:
                raise OutputBusy(
                    f"Another process is writing {self.destination}. Wait until it is done, or choose another --out."
                )
            if not _is_at(lock, self.root):
                os.close(lock)  # another process renamed or removed the directory after it was opened here
            elif os.fstat(lock).st_uid != _owner_of_new_files(self.root.parent):
                os.close(lock)
                raise _not_ours(self.root, "belongs to another user")
            else:
                return lock


def partial_directory(destination: Path) -> Path:
    """Where an artifact is written until it is published."""
    return destination.parent / f".{destination.name}.partial"


def _record(destination: Path) -> Path:
    """The file that says which conversion made the artifact, and which manifest it wrote."""
    return destination.parent / f".{destination.name}.conversion"


def _not_ours(root: Path, what: str) -> OutputUnwritable:
    return OutputUnwritable(
        f"{root} {what}: what is written there would go where somebody else chose. Remove it, or choose another --out."
    )


def _owner_of_new_files(directory: Path) -> int:
    """The user that a new file belongs to: a network file system may map this process's user to another one."""
    with tempfile.TemporaryFile(dir=directory) as file:
        return os.fstat(file.fileno()).st_uid


def _lock(directory: Path) -> int | None:
    """A descriptor that holds the directory's lock; None while another process has it."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the path still leads to the open directory."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False
