"""SHA-256 of a file whose bytes pass through memory anyway, while the file is read or written."""

from __future__ import annotations

import hashlib
from pathlib import Path

_READ_BYTES = 4 << 20


class FileDigest:
    """Hashes the pieces that follow one another from the file's start; `finish` reads the rest from the disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sha = hashlib.sha256()
        self._position = 0

    def update(self, offset: int, piece: bytes | memoryview) -> None:
        """Hash the bytes at `offset` if they follow the last ones. In the file they must not change afterwards."""
        if offset == self._position:
            self._sha.update(piece)
            self._position += len(piece)

    def finish(self) -> str:
        """The digest of the whole file, as it is on disk now."""
        buffer = memoryview(bytearray(_READ_BYTES))
        with self._path.open("rb", buffering=0) as stream:
            stream.seek(self._position)
            while count := stream.readinto(buffer):
                self.update(self._position, buffer[:count])
        return self._sha.hexdigest()
