"""Files that are read whole into memory: settings, tokenizers, chat templates. Their size is checked first."""

from __future__ import annotations

import stat
from pathlib import Path

from convert.errors import ConvertError

# Twice the largest tokenizer in use (Gemma 3: 33 MB). Parsed, a JSON file takes up to 20 times its size in memory.
MAX_BYTES = 1 << 26


def require_small(path: Path, error: type[ConvertError]) -> None:
    """Raises `error` for what is no regular file, or too large to be read whole, and OSError as `Path.stat`."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # a named pipe would be waited for without end
        raise error(f"{path} is not a file. Copy the directory again, whole.")
    if status.st_size > MAX_BYTES:
        raise error(
            f"{path} is {status.st_size >> 20} MiB large; a file of this name is read up to {MAX_BYTES >> 20} MiB. "
            "Copy the file again from the original model."
        )


def read_small(path: Path, error: type[ConvertError]) -> bytes:
    """The content of a file. Raises as `require_small`."""
    require_small(path, error)
    return path.read_bytes()
