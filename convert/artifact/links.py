"""Symbolic links in directories that others made. A link that leads out of its directory could name any file of this
machine, whose content would become a part of the published model.

Allowed are links within the directory, and those by which a hub cache keeps the files of a repository:

    models--OWNER--NAME/snapshots/REVISION/config.json -> ../../blobs/HASH
"""

from __future__ import annotations

import os
from pathlib import Path

from convert.artifact.file_names import ADAPTER_STEM, MODEL_STEM, OTHER_CHAT_TEMPLATES, READ_FILES
from convert.errors import ConvertError

_WEIGHTS = tuple(f"{stem}{end}" for stem in (ADAPTER_STEM, MODEL_STEM) for end in (".safetensors", "-"))
_SNAPSHOTS, _BLOBS = "snapshots", "blobs"


def require_contained(root: Path, error: type[ConvertError]) -> None:
    """Raises `error` if a file of the directory, or a chat template in its subdirectory, lies elsewhere by a link: it
    might be read or copied. As `require_no_dangling` besides."""
    require_no_dangling(root, error)
    for path in _entries(root, error):
        if not is_contained(path, root) and os.path.isfile(path):  # noqa: PTH113  (False without the right to look)
            raise error(
                f"{path} is a symbolic link to a file outside {root}, which is not read. "
                "Copy the file there if it belongs to the model."
            )


def require_no_dangling(root: Path, error: type[ConvertError]) -> None:
    """Raises `error` if a file of the directory that would be read is a link that leads to nothing: without an error
    it would count as a file that was never there."""
    for path in _entries(root, error):
        is_read = path.name in READ_FILES or path.name.startswith(_WEIGHTS) or path.suffix == ".jinja"
        if (is_read or path.name == OTHER_CHAT_TEMPLATES) and is_dangling(path):
            raise error(f"{dangling(path)} Copy the file itself there, or download the directory again.")


def is_dangling(path: Path) -> bool:
    """Whether a path is a symbolic link that leads to nothing, or in a circle."""
    return os.path.islink(path) and not os.path.exists(path)  # noqa: PTH110, PTH114  (False for what is no path)


def dangling(path: Path) -> str:
    """A sentence on a link for which `is_dangling` holds."""
    return f"{path} is a dangling link: it leads to {path.readlink()}, and there is nothing."


def is_contained(path: Path, root: Path | None = None) -> bool:
    """Whether a path, after all links are resolved, is in the directory `root`, or in the blobs of its repository in a
    hub cache. `root`: by default the directory that the path names."""
    directory = Path(os.path.realpath(root or path.parent))
    target = Path(os.path.realpath(path))
    blobs = _blobs(directory)
    return target.is_relative_to(directory) or (blobs is not None and target.is_relative_to(blobs))


def _entries(root: Path, error: type[ConvertError]) -> list[Path]:
    try:
        return sorted([*root.iterdir(), *root.glob(f"{OTHER_CHAT_TEMPLATES}/*")])
    except OSError as cause:
        raise error(f"{root} can't be listed: {cause.strerror}.") from cause


def _blobs(root: Path) -> Path | None:
    """Where a hub cache keeps the files of the snapshot that `root` is or lies in; None outside a hub cache."""
    for directory in (root, *root.parents):
        repository = directory.parent.parent
        if directory.parent.name == _SNAPSHOTS and repository.name.startswith("models--"):
            return repository / _BLOBS
    return None
