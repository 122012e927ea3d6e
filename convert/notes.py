"""What trainers leave beside an adapter, and where: small text files, never pickles.

checkpoint-K/            the checkpoint; most trainers put everything here
..                       the run: read only where the checkpoint's name is that of a step of a run
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.errors import CheckpointUnreadable, ConvertError
from convert.tensors import read_json

# A step of a run: transformers' checkpoint-500, torchtune's epoch_0 and step_100, ms-swift's default below a step.
_STEP = re.compile(r"(?:checkpoint|epoch|step|global_step)[-_]?\d+|checkpoint-(?:best|last|final)|default")
_MAX_NOTE_BYTES = 4 << 20

# File beside the adapter -> trainer, most telling first. Without any of them it is plain PEFT.
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
    """The checkpoint, and above it the directories of its run; the nearest first."""
    found, place = [root], root.resolve()
    while _STEP.fullmatch(place.name) and place.parent != place:
        place = place.parent
        found.append(place)
    return tuple(found)


def text(path: Path) -> str:
    """A trainer's note; empty where there is none, or none that a note could be."""
    try:
        if path.stat().st_size > _MAX_NOTE_BYTES:
            return ""
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def document(path: Path) -> dict[str, Any]:
    """A note in JSON. Broken notes are no evidence, and no reason to refuse the adapter beside them."""
    try:
        return read_json(path, CheckpointUnreadable)
    except ConvertError:
        return {}


def model_card(directory: Path) -> str:
    return text(directory / "README.md")


def layout_of(root: Path, config: Mapping[str, Any]) -> str:
    """The trainer whose layout a checkpoint has."""
    places = directories(root)
    for place in places:
        for marker, layout in _MARKERS:
            if (place / marker).is_file():
                return layout
    name = config.get("base_model_name_or_path")
    if config.get("revision") == "unsloth" or (isinstance(name, str) and name.startswith("unsloth/")):
        return "unsloth"
    for place in places:
        card = model_card(place)
        for word, layout in _CARD_WORDS:
            if word.search(card):
                return layout
    return "peft"


def repository_of(root: Path) -> str | None:
    """The base model's hub id, where torchtune noted it."""
    for place in directories(root):
        name = document(place / "original_repo_id.json").get("repo_id")
        if isinstance(name, str) and name:
            return name
    return None


def base_config(root: Path) -> dict[str, Any]:
    """config.json of the base model, where the trainer copied it to the checkpoint or its run; else empty."""
    return next((found for place in directories(root) if (found := document(place / "config.json"))), {})


_SCALAR = re.compile(r"^(?:- )?([\w.]+):[ \t]*([^\s#]+)", re.MULTILINE)
_VALUES: Mapping[str, Any] = {"true": True, "false": False, "null": None, "none": None, "~": None}


def scalars(lines: str) -> dict[str, Any]:
    """`name: value` lines of the outermost level. Enough for what is asked here, and no YAML parser to feed."""
    found = {}
    for name, value in _SCALAR.findall(lines):
        plain = value.strip("\"'")
        found[name] = _VALUES.get(plain.lower(), plain)
    return found
