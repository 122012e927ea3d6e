"""Files that are not what was expected: pointers, other programs' formats, pickles. What each is, and the way out."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

_GGUF = (
    "is a GGUF file, the format of llama.cpp, whose weights are rounded already. Give the directory of the original "
    "model, with config.json and safetensors"
)
_BY_FIRST_BYTES: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs",
        "is a pointer of Git LFS, not the file itself. Run `git lfs pull` in its clone, or download the repository "
        "again with `hf download`",
    ),
    (b"GGUF", _GGUF),
    (b"PK\x03\x04", "is an archive of torch.save, a pickle under another name. Save it as safetensors"),
    (b"<!DOCTYPE html", "is a web page: the download failed. Download the file again"),
    (b"<html", "is a web page: the download failed. Download the file again"),
)
_READ_BYTES = 32

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_PICKLE_STEMS = ("adapter_model", "pytorch_model", "model")


def foreign_format(path: Path) -> str | None:
    """What a file is that should be JSON or safetensors, and what to do, to follow its name; None where unknown."""
    try:
        with path.open("rb") as stream:
            start = stream.read(_READ_BYTES)
    except OSError:
        return None
    return next((says for first_bytes, says in _BY_FIRST_BYTES if start.startswith(first_bytes)), None)


def missing_weights(directory: Path, expected: str) -> str:
    """Why a directory has no file of that name, and what to do."""
    if gguf := sorted(directory.glob("*.gguf")):
        return f"{gguf[0]} {_GGUF}."
    if consolidated := sorted(directory.glob("consolidated*.pth")):
        return (
            f"{consolidated[0]} has the layout of Meta's own code. Give the same model in Hugging Face's layout, with "
            f"{expected}."
        )
    pickles = sorted({path.name for pattern in _PICKLES for path in directory.glob(pattern)})
    stem = next((stem for stem in _PICKLE_STEMS for name in pickles if name.startswith(stem)), None)
    if stem is None:
        return f"{directory} has no {expected}: give a directory that is whole, or copy it again."
    names = [name for name in pickles if name.startswith(stem)]
    return (
        f"{directory} holds its weights as {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: a "
        "pickle, which runs code when it is loaded and is never opened here. If you trust its origin, save it as "
        f"safetensors first: {_rescue(directory, names, expected)}"
    )


def _rescue(directory: Path, names: list[str], expected: str) -> str:
    """The command line that saves pickles as one safetensors file. Tensors that share memory are copied."""
    tensors = f"k: v.clone() for f in {json.dumps(names)} for k, v in torch.load(f, weights_only=True).items()"
    save = f'save_file({{{tensors}}}, {json.dumps(expected)}, {{"format": "pt"}})'
    code = f"import torch; from safetensors.torch import save_file; {save}"
    return f"cd {shlex.quote(str(directory))} && python -c {shlex.quote(code)}"
