"""Symbolic links in directories that others made. A link that leads out of its directory could name any file of this
machine, whose content would become a part of the published model.

Allowed are links within the directory, and those by which a hub cache keeps the files of a repository:

    models--OWNER--NAME/snapshots/REVISION/config.json -> ../../blobs/HASH
"""

from __future__ import annotations

import os
from pathlib import Path

from convert.artifact.file_names import OTHER_CHAT_TEMPLATES
from convert.errors import ConvertError

_SNAPSHOTS, _BLOBS = "snapshots", "blobs"


def require_contained(root: Path, error: type[ConvertError]) -> None:
    """Raises `error` if a file of the directory, or a chat template in its subdirectory, lies elsewhere by a link: it
    might be read or copied."""
    try:
        entries = sorted([*root.iterdir(), *root.glob(f"{OTHER_CHAT_TEMPLATES}/*")])
    except OSError as cause:
        raise error(f"{root} can't be listed: {cause.strerror}.") from cause
    for path in entries:
        if not is_contained(path, root) and os.path.isfile(path):  # noqa: PTH113  (False without the right to look)
            raise error(
                f"{path} is a symbolic link to a file outside {root}, which is not read. "
                "Copy the file there if it belongs to the model."
            )


def is_contained(path: Path, root: Path | None = None) -> bool:
    """Whether a path, after all links are resolved, is in the directory `root`, or in the blobs of its repository in a
    hub cache. `root`: by default the directory that the path names."""
    directory = Path(os.path.realpath(root or path.parent))
    target = Path(os.path.realpath(path))
    blobs = _blobs(directory)
    return target.is_relative_to(directory) or (blobs is not None and target.is_relative_to(blobs))


def _blobs(root: Path) -> Path | None:
    """Where a hub cache keeps the files of the snapshot that `root` is or lies in; None outside a hub cache."""
    for directory in (root, *root.parents):
        repository = directory.parent.parent
        if directory.parent.name == _SNAPSHOTS and repository.name.startswith("models--"):
            return repository / _BLOBS
    return None
