"""SHA-256 of a file whose bytes pass by anyway, while it is read or written."""

from __future__ import annotations

import hashlib
from pathlib import Path

_READ_BYTES = 4 << 20


class FileDigest:
    """Takes the pieces it is shown in the order of the file; what it was not shown so is read at the end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sha = hashlib.sha256()
        self._position = 0

    def show(self, offset: int, piece: bytes | memoryview) -> None:
        """Bytes that are, or are being written, at `offset`. Nothing may be changed once it was shown."""
        if offset == self._position:
            self._sha.update(piece)
            self._position += len(piece)

    def finish(self) -> str:
        """The digest of the whole file, as it is on disk now."""
        buffer = memoryview(bytearray(_READ_BYTES))
        with self._path.open("rb", buffering=0) as stream:
            stream.seek(self._position)
            while count := stream.readinto(buffer):
                self.show(self._position, buffer[:count])
        return self._sha.hexdigest()
