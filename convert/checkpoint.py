"""The checkpoint: an adapter as a trainer left it.

    adapter_config.json           rank, alpha, what was trained
    adapter_model.safetensors     the tensors (`keys` says which names mean what, `contents` what they amount to)

and whatever the trainer puts beside them (`notes`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from convert import lora, notes
from convert.artifact import digest, file_sha256
from convert.contents import Contents, Rows, Whole
from convert.errors import CheckpointUnreadable, CheckpointUnsupported
from convert.formats import (
    ADAPTER_CONFIG,
    ADAPTER_STEM,
    CHAT_TEMPLATE_FILES,
    HARMLESS_SETTINGS,
    LAYER_LINEAR,
    PLAIN_INITS,
    SERVED_RANKS,
    TOKENIZER_FILES,
    UNSUPPORTED_SETTINGS,
)
from convert.keys import NATIVE_TARGETS
from convert.pairs import LoraPair
from convert.tensors import Tensors, all_finite, read_json

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "LoraPair", "Rows", "Whole"]

RouteName = Literal["adapter", "merge", "rebase", "recover"]

_NEUTRAL: tuple[object, ...] = (None, False, [], {}, "")


@dataclass(frozen=True)
class Checkpoint:
    """An adapter checkpoint whose headers have been read. `problems` says what no route can treat."""

    root: Path
    config: Mapping[str, Any]
    layout: str
    contents: Contents
    problems: tuple[str, ...]
    tensors: Tensors

    @classmethod
    def open(cls, root: Path) -> Checkpoint:
        """Read the configuration and the headers, no weights. Raises CheckpointUnreadable."""
        root = _adapter_in(root)
        config = read_json(root / ADAPTER_CONFIG, CheckpointUnreadable)
        tensors = Tensors.open(root, ADAPTER_STEM, CheckpointUnreadable)
        contents = Contents.of(config, tensors.specs, notes.base_config(root))
        problems = _setting_problems(config) + list(contents.problems)
        if contents.is_empty and not problems:
            problems.append("the adapter file holds no LoRA weights: was it saved from the trained model?")
        layout = "torchtune" if contents.native else notes.layout_of(root, config)
        return cls(root, config, layout, contents, tuple(problems), tensors)

    @property
    def pairs(self) -> Mapping[str, LoraPair]:
        """Deltas of linear layers, by module."""
        return self.contents.pairs

    @property
    def notes(self) -> tuple[str, ...]:
        """What was repaired or is odd, and stops nothing. Reads the weights once."""
        return self.contents.notes + self._weights[1]

    @property
    def all_problems(self) -> tuple[str, ...]:
        """`problems`, or where there are none those that only the weights tell. Reads the weights once."""
        return self.problems or self._weights[0]

    @property
    def beside(self) -> str:
        """What was trained beside LoRA on linear layers, in words; empty where nothing was."""
        contents = self.contents
        counts = (
            (sum(pair.magnitude is not None for pair in self.pairs.values()), "DoRA magnitudes"),
            (len(contents.saved), "whole weights"),
            (sum(len(rows.indices) for rows in contents.rows.values()), "token rows"),
            (len(contents.embeddings), "embedding deltas"),
        )
        return ", ".join(f"{count} {what}" for count, what in counts if count)

    def problems_for(self, route: RouteName) -> tuple[str, ...]:
        """What this route can't treat and another one can, beyond `problems`."""
        if route == "merge":
            return ()
        found = []
        if dora := sum(pair.magnitude is not None for pair in self.pairs.values()):
            found.append(
                f"{dora} modules are DoRA, which is no sum of base and delta and is served as an adapter by nobody: "
                "merge it with --route merge"
            )
        if route != "adapter":
            if self.contents.embeddings or self.contents.saved or self.contents.rows:
                found.append(
                    f"more was trained than LoRA on linear layers ({self.beside}): take --route merge or adapter"
                )
            return tuple(found)
        if large := [pair for pair in self.pairs.values() if pair.rank > SERVED_RANKS[-1]]:
            allowed = ", ".join(map(str, SERVED_RANKS))
            found.append(
                f"{large[0].module} and {len(large) - 1} more have rank {max(pair.rank for pair in large)}; vLLM "
                f"serves adapters up to rank {SERVED_RANKS[-1]} ({allowed}): merge it with --route merge"
            )
        if linear := [name for name in self.contents.saved if LAYER_LINEAR.fullmatch(name.removesuffix(".weight"))]:
            found.append(f"{linear[0]} was trained as a whole, which no adapter holds: merge it with --route merge")
        if not self.pairs:
            found.append("no LoRA weights on linear layers, so no adapter would remain: merge it with --route merge")
        return tuple(found)

    @property
    def base_name(self) -> str | None:
        """The base model as the trainer named it: a hub id or a local path."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else notes.repository_of(self.root)

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({pair.rank for pair in self.pairs.values()}))

    @property
    def alphas(self) -> tuple[float, ...]:
        return tuple(sorted({pair.alpha for pair in self.pairs.values()}))

    @property
    def targets(self) -> tuple[str, ...]:
        """Last parts of the adapted modules' paths, each once."""
        return tuple(sorted({module.rpartition(".")[2] for module in self.pairs}))

    @property
    def weight_bytes(self) -> int:
        return sum(spec.nbytes for spec in self.tensors.specs.values())

    @property
    def digest(self) -> str:
        """digest() of the adapter's own files: what training notes lie beside them changes nothing."""
        files = (self.root / ADAPTER_CONFIG, *self.tensors.files)
        return digest({path.name: file_sha256(path) for path in files})

    @property
    def tokenizer_files(self) -> tuple[Path, ...]:
        return tuple(path for name in TOKENIZER_FILES if (path := self.root / name).is_file())

    @property
    def chat_template_files(self) -> tuple[Path, ...]:
        return tuple(path for name in CHAT_TEMPLATE_FILES if (path := self.root / name).is_file())

    def read(self, pair: LoraPair) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, in) and B (out, r) in the types they are stored in."""
        a, b = self.tensors.read(pair.a.name), self.tensors.read(pair.b.name)
        if pair.transposed:
            return a.T.contiguous(), b.T.contiguous()
        return a, lora.by_halves(b, pair.head_dim) if pair.head_dim else b

    @property
    def settings(self) -> dict[str, Any]:
        """adapter_config.json in PEFT's own words."""
        settings = dict(self.config)
        targets = settings.get("target_modules")
        if self.contents.native and isinstance(targets, list):
            settings["target_modules"] = sorted({NATIVE_TARGETS.get(name, name) for name in targets})
        return settings

    def require_supported(self) -> None:
        """Raises CheckpointUnsupported with every problem: of settings, keys, shapes, then of the weights."""
        self._require(self.all_problems)

    def require_route(self, route: RouteName) -> None:
        """Raises CheckpointUnsupported with everything this route can't treat."""
        self._require(self.problems_for(route))

    def _require(self, problems: tuple[str, ...]) -> None:
        if problems:
            listed = "".join(f"\n  - {problem}" for problem in problems)
            raise CheckpointUnsupported(f"{self.root} can't be converted honestly:{listed}")

    @cached_property
    def _weights(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Problems and notes that only the weights tell."""
        if self.problems:
            return (), ()
        problems = [
            f"{spec.name!r} holds NaN or Inf: take an earlier checkpoint of the run"
            for spec in self.contents.specs
            if not all_finite(self.tensors.read(spec.name))
        ]
        pairs = (*self.pairs.values(), *self.contents.embeddings.values())
        idle = [pair.module for pair in pairs if not self._has_effect(pair)]
        if problems:
            return tuple(problems), ()
        if len(idle) == len(pairs) and not self.contents.saved and not self.contents.rows:
            return ("every delta is zero, so the adapter changes nothing: was it saved before the first step?",), ()
        return (), (_idle(idle, len(pairs)),) if idle else ()

    def _has_effect(self, pair: LoraPair) -> bool:
        if pair.magnitude:
            return True
        return bool(pair.scaling and all(self.tensors.read(spec.name).any() for spec in (pair.a, pair.b)))


def _idle(modules: list[str], total: int) -> str:
    named = ", ".join(modules[:3]) + (", …" if len(modules) > 3 else "")
    return f"{len(modules)} of {total} adapted modules have a delta of zero, so nothing was learnt there: {named}"


def _adapter_in(root: Path) -> Path:
    """The directory of the adapter's own files. Raises CheckpointUnreadable."""
    if (root / ADAPTER_CONFIG).is_file():
        return root
    if (root / "default" / ADAPTER_CONFIG).is_file():  # the first ms-swift named its adapters, and saved them below
        return root / "default"
    if not root.is_dir():
        raise CheckpointUnreadable(f"{root} is not a directory. Give the directory that holds {ADAPTER_CONFIG}.")
    # ms-swift puts a directory per run in between: vN-DATE/checkpoint-K.
    steps = [path.parent for depth in ("*", "*/*") for path in root.glob(f"{depth}/{ADAPTER_CONFIG}")]
    if steps:
        names = ", ".join(str(path) for path in sorted(steps, key=_step))
        raise CheckpointUnreadable(f"{root} is a trainer's output directory. Give one checkpoint of it: {names}")
    hint = " It looks like a whole model: convert needs the adapter." if (root / "config.json").is_file() else ""
    raise CheckpointUnreadable(f"{root} holds no adapter: {ADAPTER_CONFIG} is missing.{hint}")


def _step(path: Path) -> tuple[int, str]:
    digits = re.search(r"(\d+)$", path.name)
    return (int(digits[1]) if digits else -1, path.name)


def _setting_problems(config: Mapping[str, Any]) -> list[str]:
    problems = []
    if str(config.get("peft_type", "")).upper() != "LORA":
        problems.append(f"peft_type is {config.get('peft_type')!r}: only LORA adapters are supported")
    for name, value in config.items():
        setting = UNSUPPORTED_SETTINGS.get(name)
        if setting and value not in setting.neutral:
            problems.append(f"{name}={value!r}: {setting.why}")
        elif name == "init_lora_weights" and value not in PLAIN_INITS:
            problems.append(
                f"init_lora_weights={value!r} changed the base weights before training, so the adapter alone is wrong "
                "on the original base: save it converted to plain LoRA (PEFT: path_initial_model_for_weight_conversion)"
            )
        elif not setting and name not in (*HARMLESS_SETTINGS, "init_lora_weights") and value not in _NEUTRAL:
            problems.append(f"{name}={value!r} is a setting not known here: it may change what the adapter does")
    return problems
