"""What lies at a path where a model or an adapter was expected, and which path to give instead."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from convert.artifact.file_names import ADAPTER_CONFIG, CONFIG
from convert.artifact.foreign_files import foreign_format
from convert.artifact.links import dangling, is_dangling

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# PEFT saves an adapter that is not called "default" in a directory of its name, and trainers in one for each step.
_DEPTHS = ("*", "*/*")
_MOST_SHOWN = 4


def why_no_directory(path: Path, expected: str) -> str:
    """Why a path is no directory, and what to give instead. `expected`: what was asked for, in words."""
    if path.is_file():
        says = foreign_format(path) or f"is a file. Give {expected}"
        return f"{path} {says}."
    if is_dangling(path):
        return f"{dangling(path)} Give {expected}."
    text = str(path)
    if _HUB_ID.fullmatch(text) and not path.parent.exists():
        return (
            f"{path} is not a directory here. Give {expected}: if this is a name on the Hugging Face hub, download it "
            f"first: hf download {shlex.quote(text)} --local-dir DIR"
        )
    return f"{path} does not exist. Give {expected}."


def why_no_model(directory: Path) -> str:
    """Why a directory without config.json is no model, and what to give instead."""
    if snapshots := _snapshots(directory, CONFIG):
        return _in_hub_cache(directory, snapshots)
    if (directory / ADAPTER_CONFIG).is_file():
        return f"{directory} holds an adapter, not its base: {CONFIG} is missing. Give the base model."
    if gguf := sorted(directory.glob("*.gguf")):
        return f"{gguf[0]} {foreign_format(gguf[0]) or 'is not a model that is read here'}."
    if models := _below(directory, CONFIG):
        return f"{directory / CONFIG} is missing. Models lie below it: {_listed(models)}"
    return f"{directory / CONFIG} is missing. Give a model directory that is whole."


def why_no_adapter(directory: Path) -> str:
    """Why a directory without adapter_config.json is no checkpoint, and what to give instead."""
    if snapshots := _snapshots(directory, ADAPTER_CONFIG):
        return _in_hub_cache(directory, snapshots)
    if below := checkpoints_below(directory):
        return f"{directory} is a trainer's output directory. {below}"
    hint = " It looks like a whole model: convert needs the adapter." if (directory / CONFIG).is_file() else ""
    return f"{directory} holds no adapter: {ADAPTER_CONFIG} is missing.{hint}"


def checkpoints_below(directory: Path) -> str:
    """A sentence that names the adapters at most two levels below, the last step of a run first; empty without any."""
    adapters = _below(directory, ADAPTER_CONFIG)
    return f"Give one checkpoint of it: {_listed(adapters)}" if adapters else ""


def gathering_problem(root: Path, shapes: Mapping[str, Sequence[int]]) -> str | None:
    """A problem of a sharded run whose pieces were saved ungathered: nothing is in the file, or tensors of size 0."""
    empty = [name for name, shape in shapes.items() if 0 in shape]
    if shapes and not empty:
        return None
    what = f"{empty[0]!r} and {len(empty) - 1} more tensors are empty" if empty else "the adapter file holds no tensors"
    pieces = sorted(path.name for path in (*root.glob("global_step*"), *root.glob("zero_to_fp32.py")))
    if pieces:
        return (
            f"{what}: DeepSpeed ZeRO-3 left the weights in pieces ({', '.join(pieces)}). Gather them with "
            "zero_to_fp32.py, or train with stage3_gather_16bit_weights_on_model_save, and save the adapter again"
        )
    return f"{what}: it was saved from a sharded run before its pieces were gathered. Gather them, and save it again"


def _below(directory: Path, name: str) -> tuple[Path, ...]:
    directories = {path.parent for depth in _DEPTHS for path in directory.glob(f"{depth}/{name}")}
    return tuple(sorted(directories, key=_step, reverse=True))


def _snapshots(directory: Path, name: str) -> tuple[Path, ...]:
    """The snapshots in a hub cache, or in the directory of one repository there, that have a file of that name."""
    repositories = [directory] if (directory / "snapshots").is_dir() else sorted(directory.glob("models--*"))
    return tuple(snapshot.parent for repo in repositories for snapshot in _newest_first(repo, name))


def _newest_first(repository: Path, name: str) -> Sequence[Path]:
    """refs/main names the snapshot that the hub's library would take."""
    main = repository / "refs" / "main"
    commit = main.read_text(errors="replace").strip() if main.is_file() else ""
    files = sorted(repository.glob(f"snapshots/*/{name}"))
    return sorted(files, key=lambda file: file.parent.name != commit)


def _in_hub_cache(directory: Path, snapshots: Sequence[Path]) -> str:
    return f"{directory} is the root of a hub cache. Give the snapshot in it: {_listed(snapshots)}"


def _listed(paths: Sequence[Path]) -> str:
    more = f" and {len(paths) - _MOST_SHOWN} more" if len(paths) > _MOST_SHOWN else ""
    return ", ".join(shlex.quote(str(path)) for path in paths[:_MOST_SHOWN]) + more


def _step(path: Path) -> tuple[int, str]:
    step = re.search(r"(\d+)$", path.name)
    return (int(step[1]) if step else -1, path.name)
