"""Model directories that appear complete or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TOKENIZER_NAMES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@contextmanager
def published(destination: Path) -> Iterator[Path]:
    """A directory to fill that becomes `destination` in one step, or disappears on an error.

    What was at `destination` before is replaced.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        yield draft
        make_readable(draft)
        if destination.exists():
            shutil.rmtree(destination)
        draft.rename(destination)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def make_readable(directory: Path) -> None:
    """Let everyone read the directory: mkdtemp and safetensors create files that only their owner can read."""
    directory.chmod(0o755)
    for path in directory.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def copy_tokenizer(model: Path, destination: Path) -> None:
    """Copy the files of tokenizer and chat template: loading and saving them would add settings of the loader."""
    for name in TOKENIZER_NAMES:
        shutil.copyfile(model / name, destination / name)
