"""The chat templates of a directory, in every place where a version of transformers saves them:

chat_template.jinja, additional_chat_templates/NAME.jinja     one file for each
tokenizer_config.json, "chat_template"                        one text, or a list of names and texts
chat_template.json, "chat_template"                           one text; saved with a processor
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.artifact.file_names import CHAT_TEMPLATE, OTHER_CHAT_TEMPLATES, PROCESSOR_CHAT_TEMPLATE, TOKENIZER_CONFIG
from convert.artifact.json_files import read_json
from convert.artifact.small_files import read_small
from convert.errors import ConvertError

INLINE = "chat_template"
_NAME = re.compile(r"\w[\w.-]{0,99}", re.ASCII)


def chat_templates(directory: Path, error: type[ConvertError]) -> dict[str, bytes]:
    """The templates by the name of the file for each; empty where there are none.

    Files win over what stands in tokenizer_config.json, as in transformers. Links are followed: whoever does not trust
    the directory calls `require_contained` before. Raises `error` for a damaged file.
    """
    files = [directory / CHAT_TEMPLATE, *sorted((directory / OTHER_CHAT_TEMPLATES).glob("*.jinja"))]
    templates = {path.relative_to(directory).as_posix(): _content(path, error) for path in files if path.is_file()}
    for name in (TOKENIZER_CONFIG, PROCESSOR_CHAT_TEMPLATE):
        path = directory / name
        if not templates and path.is_file():
            templates = inline_templates(read_json(path, error), path, error)
    return templates


def inline_templates(document: Mapping[str, Any], path: Path, error: type[ConvertError]) -> dict[str, bytes]:
    """The templates in the JSON object of the file `path`, by the name of the file for each."""
    value = document.get(INLINE)
    try:
        named = (
            {"default": value} if isinstance(value, str) else {each["name"]: each["template"] for each in value or ()}
        )
        return {_file_name(name): text.encode() for name, text in named.items()}
    except (TypeError, KeyError, AttributeError, ValueError):
        raise error(f"{path}: chat_template is neither a text nor a list of templates with their names.") from None


def _content(path: Path, error: type[ConvertError]) -> bytes:
    content = read_small(path, error)
    try:
        content.decode()
    except UnicodeDecodeError as cause:
        raise error(f"{path} is not UTF-8 text: {cause}. Copy the file again.") from None
    if not _NAME.fullmatch(path.stem):
        raise error(
            f"{path} can't be kept under this name: name it with ASCII letters, digits, '_', '-' and '.', which is the "
            "name of its chat template too."
        )
    return content


def _file_name(name: str) -> str:
    """Raises ValueError where the name would leave the directory."""
    if name == "default":
        return CHAT_TEMPLATE
    if not _NAME.fullmatch(name):
        raise ValueError
    return f"{OTHER_CHAT_TEMPLATES}/{name}.jinja"
