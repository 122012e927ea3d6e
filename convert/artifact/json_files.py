"""JSON files that others wrote: an object whose settings have the types that their readers expect, or an error."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from convert.artifact.foreign_files import foreign_format
from convert.artifact.small_files import read_small
from convert.errors import ArtifactInvalid, ConvertError

# Deeper than any settings of a model or a trainer, and far from where Python's own functions give up.
_MAX_DEPTH = 64
_MAX_SHOWN = 60
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


# Only the config.json of a multimodal model has it.
VISION = "vision_config"


class Settings(BaseModel):
    """Settings of a JSON file that are read here, with their types. Other keys of the file are not looked at."""

    model_config = ConfigDict(strict=True, frozen=True, protected_namespaces=())


S = TypeVar("S", bound=Settings)


def read_json(path: Path, error: type[ConvertError]) -> dict[str, Any]:
    """The JSON object in a file; raises `error` naming the file when there is none."""
    try:
        content = read_small(path, error)
        document = json.loads(content)
        if _SURROGATE.search(content):
            require_text(document)
    except FileNotFoundError:
        raise error(f"{path} is missing") from None
    # RecursionError: thousands of nested brackets.
    except (OSError, ValueError, RecursionError) as cause:
        raise error(f"{path} {foreign_format(path) or f'is not readable JSON: {cause}'}.") from None
    if not isinstance(document, dict):
        raise error(f"{path} must hold a JSON object, not a {type(document).__name__}")
    if _is_deeper_than(_MAX_DEPTH, document):
        raise error(f"{path} nests its values deeper than {_MAX_DEPTH} levels. Copy the file again.")
    return document


def has_setting(path: Path, name: str) -> bool:
    """Whether the JSON object in a file has the setting. False where there is none: who uses it says what is wrong."""
    try:
        return name in read_json(path, ArtifactInvalid)
    except ArtifactInvalid:
        return False


def require_text(document: object) -> None:
    """Raises ValueError where a text in the document is half of a UTF-16 pair, which can't be written again."""
    json.dumps(document, ensure_ascii=False).encode()


def settings_of(document: Mapping[str, Any], kind: type[S], path: Path, error: type[ConvertError]) -> S:
    """The settings in the JSON object of a file. Raises `error` with the file, each wrong key and what was expected."""
    try:
        return kind.model_validate(dict(document))
    except ValidationError as invalid:
        wrong = {str(problem["loc"][0]): problem["msg"] for problem in reversed(invalid.errors())}
    listed = "; ".join(
        f"{key} is {shown(document[key])}: {says[0].lower()}{says[1:]}" if key in document else f"it has no {key}"
        for key, says in sorted(wrong.items())
    )
    raise error(f"{path}: {listed}. Correct it, or copy the file again from the original model.")


def shown(value: object) -> str:
    """A value for a message, cut where it is long."""
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def _is_deeper_than(depth: int, document: object) -> bool:
    level = [document]
    for _ in range(depth):
        level = [child for value in level for child in _children(value)]
        if not level:
            return False
    return True


def _children(value: object) -> Iterable[object]:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (child for child in children if isinstance(child, dict | list))
