"""The files of a model directory besides weights: tokenizer, chat templates, generation settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from convert.artifact.chat_templates import INLINE, chat_templates, inline_templates
from convert.artifact.file_names import TOKENIZER_CONFIG, TOKENIZERS
from convert.artifact.json_files import read_json
from convert.artifact.small_files import read_small
from convert.errors import BaseUnreadable, CheckpointUnreadable, ConvertError
from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel

SideFiles = Mapping[str, Path | bytes]
"""By name in the directory: the file to copy, or the content to write."""


def side_files(checkpoint: Checkpoint, base: BaseModel) -> SideFiles:
    """Tokenizer and chat templates, and the generation settings of the base. Raises as `tokenizer_files`."""
    return tokenizer_files(checkpoint, base) | {path.name: path for path in base.generation_files}


def tokenizer_files(checkpoint: Checkpoint, base: BaseModel) -> dict[str, Path | bytes]:
    """The tokenizer of the checkpoint if it has one, else that of the base; the chat templates likewise.

    Raises BaseUnreadable where neither has a tokenizer.
    """
    tokenizer = checkpoint.tokenizer_files if _has_tokenizer(checkpoint.tokenizer_files) else base.tokenizer_files
    if not _has_tokenizer(tokenizer):
        raise BaseUnreadable(
            f"{base.root} has no tokenizer, and neither has {checkpoint.root}. Copy tokenizer.json and "
            "tokenizer_config.json of the base model into its directory."
        )
    templates = _templates_of(checkpoint, base)
    files: dict[str, Path | bytes] = {path.name: path for path in tokenizer}
    files.update(templates)
    config = files.get(TOKENIZER_CONFIG)
    if templates and isinstance(config, Path):
        error = CheckpointUnreadable if config.parent == checkpoint.root else BaseUnreadable
        files[TOKENIZER_CONFIG] = _with_one_template(config, templates, error)
    return files


def differing_files(checkpoint: Checkpoint, base: BaseModel) -> tuple[str, ...]:
    """Names of the checkpoint's tokenizer and template files that the base lacks, or has with other bytes."""
    of_base = _contents(base.root, base.tokenizer_files, BaseUnreadable)
    of_checkpoint = _contents(checkpoint.root, checkpoint.tokenizer_files, CheckpointUnreadable)
    return tuple(name for name, content in of_checkpoint.items() if of_base.get(name) != content)


def content_of(file: Path | bytes) -> bytes:
    return file if isinstance(file, bytes) else file.read_bytes()


def json_content(document: Mapping[str, object]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def _templates_of(checkpoint: Checkpoint, base: BaseModel) -> dict[str, bytes]:
    return chat_templates(checkpoint.root, CheckpointUnreadable) or chat_templates(base.root, BaseUnreadable)


def _with_one_template(path: Path, templates: Mapping[str, bytes], error: type[ConvertError]) -> Path | bytes:
    """tokenizer_config.json without another template than the files', since some readers would take that one."""
    document = read_json(path, error)
    if INLINE not in document or inline_templates(document, path, error) == templates:
        return path
    return json_content({name: value for name, value in document.items() if name != INLINE})


def _contents(root: Path, tokenizer_files: tuple[Path, ...], error: type[ConvertError]) -> dict[str, bytes]:
    return {path.name: read_small(path, error) for path in tokenizer_files} | chat_templates(root, error)


def _has_tokenizer(files: tuple[Path, ...]) -> bool:
    return any(path.name in TOKENIZERS for path in files)
