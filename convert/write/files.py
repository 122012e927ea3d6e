"""The small files of a model or adapter directory. Each is durable when the function returns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from convert.artifact.durable_files import create_file
from convert.plan.side_files import SideFiles, content_of


def write_json(path: Path, document: Mapping[str, object]) -> None:
    """Write a new file of indented JSON."""
    create_file(path, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())


def write_side_files(directory: Path, files: SideFiles) -> None:
    """Copy and write the side files of a model that the directory does not have yet."""
    for name, file in files.items():
        path = directory / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            create_file(path, content_of(file))
