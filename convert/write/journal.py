"""The journal in the directory of an unfinished artifact: which conversion it is, and which files are finished.

    {"conversion": "<id of the conversion>"}
    {"file": "model/model-00001-of-00007.safetensors", "sha256": "…"}

A line is added for each finished file, without fsync: a file counts as finished only if its bytes have the digest in
the journal, so that a file which a power cut damaged is noticed and written again.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from convert.artifact import file_sha256
from convert.artifact.durable_files import replace_file, sync

JOURNAL = "journal"


def conversion_id(*parts: object, files: Iterable[Path]) -> str:
    """A digest of everything that the output depends on: `parts` by their repr, this code, the processor, the files.

    A file is identified by inode, size and times, because hashing a base model takes as long as merging it. A changed
    file is noticed: the time of the last change of an inode can't be set back.
    """
    sha = hashlib.sha256(repr((parts, _code(), platform.machine(), _processor())).encode())
    for path in files:
        stat = path.stat()
        sha.update(repr((path.name, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)).encode())
    return sha.hexdigest()


class Journal:
    """The journal of one unfinished artifact. `finished`: digests of finished files, by path in the directory."""

    def __init__(self, root: Path, finished: dict[str, str]) -> None:
        self._root = root
        self._finished = finished

    @classmethod
    def open(cls, root: Path, conversion: str | None) -> Journal:
        """Keep the finished files of the same conversion in the directory, and remove every other file there."""
        finished = _read(root / JOURNAL, conversion) if conversion else {}
        _remove_all_but(root, {JOURNAL, *finished})
        # The journal is written anew, since its last line may be incomplete.
        entries = [{"conversion": conversion or ""}, *({"file": name, "sha256": finished[name]} for name in finished)]
        replace_file(root / JOURNAL, "".join(map(_line, entries)).encode())
        return cls(root, {name: sha256 for name, sha256 in finished.items() if (root / name).is_file()})

    @property
    def is_empty(self) -> bool:
        """Whether no file is finished."""
        return not self._finished

    def sha256(self, path: Path) -> str | None:
        """The digest of a finished file in the journal."""
        return self._finished.get(self._name(path))

    def holds(self, path: Path) -> bool:
        """Whether the file is finished: its bytes are hashed. One with other bytes is removed."""
        expected = self.sha256(path)
        if expected is None:
            return False
        if file_sha256(path) != expected:
            del self._finished[self._name(path)]
            path.unlink()
            return False
        sync(path)
        return True

    def add(self, path: Path, sha256: str) -> None:
        """Record that a file is finished, with its digest."""
        self._finished[self._name(path)] = sha256
        with (self._root / JOURNAL).open("a") as stream:
            stream.write(_line({"file": self._name(path), "sha256": sha256}))

    def remove(self) -> None:
        """Remove the journal of a complete artifact."""
        (self._root / JOURNAL).unlink()

    def _name(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix()


def _read(path: Path, conversion: str) -> dict[str, str]:
    """Finished files and their digests; none where the journal is of another conversion."""
    try:
        head, *lines = path.read_text().splitlines()
        if json.loads(head) != {"conversion": conversion}:
            return {}
    except (OSError, ValueError):
        return {}
    finished = {}
    for line in lines:
        try:
            entry = json.loads(line)
            finished[str(entry["file"])] = str(entry["sha256"])
        except (ValueError, KeyError, TypeError):
            break
    return finished


def _line(entry: dict[str, str]) -> str:
    return json.dumps(entry) + "\n"


def _remove_all_but(root: Path, names: set[str]) -> None:
    for path in sorted(root.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            with suppress(OSError):  # not empty
                path.rmdir()
        elif path.is_symlink() or path.relative_to(root).as_posix() not in names:
            path.unlink()


def _code() -> str:
    """A digest of the modules of `convert`, since other code may write other bytes."""
    sha = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        sha.update(path.read_bytes())
    return sha.hexdigest()


def _processor() -> str:
    """The instruction set that torch uses: with another one a sum may be rounded otherwise."""
    import torch

    return str(torch.backends.cpu.get_cpu_capability())
