"""The journal of an artifact that is being written: what it will be, and which of its files are finished.

    {"making": "<identity of the conversion>"}
    {"file": "model/model-00001-of-00007.safetensors", "sha256": "…"}

One line is added for each finished file. The journal needs no fsync: a file counts as finished only while its bytes
have the digest that was noted, so whatever a power cut tore off is found and made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from convert.artifact import file_sha256

JOURNAL = "journal"


def identity(*parts: object, files: Iterable[Path]) -> str:
    """What a conversion is a function of: values by their repr, this code, the processor, and input files.

    Files are told apart by inode, size and times: the time of the last change of an inode can't be set back, and
    hashing a base model would take as long as merging it.
    """
    sha = hashlib.sha256(repr((parts, _code(), platform.machine(), _processor())).encode())
    for path in files:
        it = path.stat()
        sha.update(repr((path.name, it.st_ino, it.st_size, it.st_mtime_ns, it.st_ctime_ns)).encode())
    return sha.hexdigest()


class Journal:
    """The journal in the directory of an unfinished artifact."""

    def __init__(self, root: Path, finished: dict[str, str]) -> None:
        self._root = root
        self._finished = finished

    @classmethod
    def open(cls, root: Path, making: str | None) -> Journal:
        """Go on with what is there if it is the same conversion; every file that is not noted as finished goes."""
        finished = _noted(root / JOURNAL, making) if making else {}
        _remove_all_but(root, {JOURNAL, *finished})
        _replace(root / JOURNAL, [{"making": making or ""}, *({"file": it, "sha256": finished[it]} for it in finished)])
        return cls(root, {name: sha for name, sha in finished.items() if (root / name).is_file()})

    @property
    def is_empty(self) -> bool:
        """Whether no file is finished."""
        return not self._finished

    def sha256(self, path: Path) -> str | None:
        """The digest of a finished file, as noted."""
        return self._finished.get(self._name(path))

    def holds(self, path: Path) -> bool:
        """Whether the file is finished: its bytes are hashed. One with other bytes is removed."""
        noted = self.sha256(path)
        if noted is None:
            return False
        if file_sha256(path) != noted:
            del self._finished[self._name(path)]
            path.unlink()
            return False
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        return True

    def note(self, path: Path, sha256: str) -> None:
        """This file is finished and has this digest."""
        self._finished[self._name(path)] = sha256
        with (self._root / JOURNAL).open("a") as stream:
            stream.write(_line({"file": self._name(path), "sha256": sha256}))

    def remove(self) -> None:
        """The artifact is complete."""
        (self._root / JOURNAL).unlink()

    def _name(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix()


def _noted(path: Path, making: str) -> dict[str, str]:
    """Finished files and their digests; none where another conversion was at work."""
    try:
        head, *lines = path.read_text().splitlines()
        if json.loads(head) != {"making": making}:
            return {}
    except (OSError, ValueError):
        return {}
    noted = {}
    for line in lines:
        try:
            entry = json.loads(line)
            noted[str(entry["file"])] = str(entry["sha256"])
        except (ValueError, KeyError, TypeError):
            break
    return noted


def _replace(path: Path, entries: list[dict[str, str]]) -> None:
    """Written anew, since its last line may be torn; at once, since a kill must not lose what was noted."""
    fresh = path.with_suffix(".new")
    fresh.write_text("".join(map(_line, entries)))
    fresh.replace(path)


def _line(entry: dict[str, str]) -> str:
    return json.dumps(entry) + "\n"


def _remove_all_but(root: Path, names: set[str]) -> None:
    for path in sorted(root.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            with suppress(OSError):  # not empty
                path.rmdir()
        elif path.relative_to(root).as_posix() not in names:
            path.unlink()


def _code() -> str:
    """A digest of this package's modules: other code may write other bytes."""
    sha = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        sha.update(path.read_bytes())
    return sha.hexdigest()


def _processor() -> str:
    """What the arithmetic runs on: another instruction set may round a sum otherwise."""
    import torch

    return str(torch.backends.cpu.get_cpu_capability())
