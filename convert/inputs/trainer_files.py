"""The files that trainers write beside an adapter: small text files. Pickles are never opened.

checkpoint-K/    the checkpoint; most trainers write every file here
..               the directory of the run; read only if the checkpoint's name is that of a step of a run
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from convert.artifact.json_files import read_json
from convert.artifact.links import is_contained
from convert.errors import CheckpointUnreadable, ConvertError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HUB_CACHE = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")
# A step of a run: transformers' checkpoint-500, torchtune's epoch_0 and step_100, ms-swift 1's default in a step.
_STEP = re.compile(r"(?:checkpoint|epoch|step|global_step)[-_]?\d+|checkpoint-(?:best|last|final)|default")
_MAX_FILE_BYTES = 4 << 20
# PyYAML reads some 100 kB a second; the settings of a run are a few kB.
_MAX_YAML_CHARACTERS = 256 << 10

# File beside the adapter -> trainer; the first file that exists decides. Without any of them it is plain PEFT.
_MARKERS: tuple[tuple[str, str], ...] = (
    ("args.json", "ms-swift"),
    ("sft_args.json", "ms-swift"),
    ("additional_config.json", "ms-swift"),
    ("training_args.yaml", "llama-factory"),
    ("llamaboard_config.yaml", "llama-factory"),
    ("trainer_log.jsonl", "llama-factory"),
    ("torchtune_config.yaml", "torchtune"),
    ("original_repo_id.json", "torchtune"),
)
# Word in the model card -> trainer.
_CARD_WORDS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"axolotl"), "axolotl"),
    (re.compile(r"llama-factory|LLaMA-Factory"), "llama-factory"),
    (re.compile(r"^- unsloth$|2x faster with \[Unsloth\]", re.MULTILINE), "unsloth"),
    (re.compile(r"^- trl$|trained with \[TRL\]", re.MULTILINE), "trl"),
)


def directories(root: Path) -> tuple[Path, ...]:
    """The checkpoint's directory, then the directories of its run, the nearest first."""
    result, directory = [root], root.resolve()
    while _STEP.fullmatch(directory.name) and directory.parent != directory:
        directory = directory.parent
        result.append(directory)
    return tuple(result)


def read_text(path: Path) -> str:
    """The text of a trainer's file; empty where the file is missing, unreadable, larger than 4 MiB, or a link to a
    file elsewhere."""
    try:
        if not path.is_file() or path.stat().st_size > _MAX_FILE_BYTES or not is_contained(path):
            return ""
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a trainer's file; empty where there is none, since a broken file, or a link to a file
    elsewhere, proves nothing."""
    try:
        return read_json(path, CheckpointUnreadable) if is_contained(path) else {}
    except ConvertError:
        return {}


def yaml_scalars(text: str) -> dict[str, Any]:
    """The settings of a YAML mapping, or of a list of mappings, whose values are scalars; empty for broken YAML.

    Python's `None`, which PEFT writes into model cards, and `none`, which LLaMA-Factory writes, are None.
    """
    if len(text) > _MAX_YAML_CHARACTERS:
        return {}
    try:
        document = _WithoutMergeKeys(text).get_single_data()
    except Exception:  # PyYAML raises errors of many kinds for hostile text, RecursionError and KeyError among them
        return {}
    settings: dict[str, Any] = {}
    for mapping in document if isinstance(document, list) else [document]:
        if isinstance(mapping, dict):
            settings |= {name: value for name, value in mapping.items() if isinstance(name, str)}
    scalars = {name: value for name, value in settings.items() if not isinstance(value, dict | list | set)}
    return {name: None if value in ("None", "none") else value for name, value in scalars.items()}


class _WithoutMergeKeys(yaml.SafeLoader):
    """A safe loader that ignores merge keys (`<<`): nested ones make memory grow exponentially with the text."""

    def flatten_mapping(self, node: Any) -> None:
        node.value = [(key, value) for key, value in node.value if key.tag != "tag:yaml.org,2002:merge"]


def model_card(directory: Path) -> str:
    return read_text(directory / "README.md")


def layout_of(root: Path, adapter_config: Mapping[str, Any]) -> str:
    """The trainer whose layout a checkpoint has."""
    run_directories = directories(root)
    for directory in run_directories:
        for marker, layout in _MARKERS:
            if (directory / marker).is_file():
                return layout
    base_name = adapter_config.get("base_model_name_or_path")
    if adapter_config.get("revision") == "unsloth" or (isinstance(base_name, str) and base_name.startswith("unsloth/")):
        return "unsloth"
    for directory in run_directories:
        card = model_card(directory)
        for word, layout in _CARD_WORDS:
            if word.search(card):
                return layout
    return "peft"


def repository_of(root: Path) -> str | None:
    """The base model's hub id in torchtune's original_repo_id.json."""
    for directory in directories(root):
        name = read_json_object(directory / "original_repo_id.json").get("repo_id")
        if isinstance(name, str) and name:
            return name
    return None


def public_name(name: str) -> str:
    """A hub id unchanged; for a local path the hub id in the name of a hub cache directory, or its last part."""
    # os.path: False for a name that is too long for a path, where pathlib raises an error.
    if _HUB_ID.fullmatch(name) and not os.path.isdir(name):  # noqa: PTH112
        return name
    for part in Path(name).parts:
        if match := _HUB_CACHE.fullmatch(part):
            return f"{match['owner']}/{match['name']}"
    return Path(name).name or "base"


def base_config(root: Path) -> dict[str, Any]:
    """config.json of the base model, where the trainer copied it to the checkpoint or its run; else empty."""
    configs = (read_json_object(directory / "config.json") for directory in directories(root))
    return next((config for config in configs if config), {})
