"""The checkpoint: an adapter as a trainer left it, in PEFT's layout.

    adapter_config.json           rank, alpha, what was trained
    adapter_model.safetensors     base_model.model.<module>.lora_A.weight (r, in) and lora_B.weight (out, r)

and whatever the trainer puts beside them (`formats`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert import lora
from convert.artifact import digest, file_sha256
from convert.errors import CheckpointUnreadable, CheckpointUnsupported
from convert.formats import (
    ADAPTER_CONFIG,
    ADAPTER_STEM,
    CHAT_TEMPLATE_FILES,
    HARMLESS_SETTINGS,
    PLAIN_INITS,
    TOKENIZER_FILES,
    UNKNOWN_KEY,
    UNSUPPORTED_KEYS,
    UNSUPPORTED_SETTINGS,
    LoraKey,
    layout_of,
    without_wrappers,
)
from convert.tensors import FLOATS, Tensors, TensorSpec, read_json

if TYPE_CHECKING:
    import torch

_NEUTRAL: tuple[object, ...] = (None, False, [], {}, "")


@dataclass(frozen=True)
class LoraPair:
    """The two halves of one module's delta; `scaling` is the factor of B·A."""

    module: str
    a: TensorSpec
    b: TensorSpec
    alpha: float
    scaling: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def in_features(self) -> int:
        return self.a.shape[1]

    @property
    def out_features(self) -> int:
        return self.b.shape[0]


@dataclass(frozen=True)
class Checkpoint:
    """An adapter checkpoint whose headers have been read. `problems` says what no route can treat."""

    root: Path
    config: Mapping[str, Any]
    layout: str
    pairs: Mapping[str, LoraPair]
    problems: tuple[str, ...]
    tensors: Tensors

    @classmethod
    def open(cls, root: Path) -> Checkpoint:
        """Read the configuration and the headers, no weights. Raises CheckpointUnreadable."""
        _require_adapter(root)
        config = read_json(root / ADAPTER_CONFIG, CheckpointUnreadable)
        tensors = Tensors.open(root, ADAPTER_STEM, CheckpointUnreadable)
        halves, problems = _halves(tensors)
        problems = _setting_problems(config) + problems
        pairs: dict[str, LoraPair] = {}
        for module, found in sorted(halves.items()):
            pair = _pair(module, found, config)
            if isinstance(pair, str):
                problems.append(pair)
            else:
                pairs[module] = pair
        if not pairs and not problems:
            problems.append("the adapter file holds no LoRA weights")
        name = config.get("base_model_name_or_path")
        layout = layout_of(root, name if isinstance(name, str) else "")
        return cls(root, config, layout, pairs, tuple(problems), tensors)

    @property
    def base_name(self) -> str | None:
        """The base model as the trainer named it: a hub id or a local path."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

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
        """A (r, in) and B (out, r) as stored."""
        return self.tensors.read(pair.a.name), self.tensors.read(pair.b.name)

    def require_supported(self) -> None:
        """Raises CheckpointUnsupported with every problem: of settings, keys, shapes, then of the weights."""
        problems = self.problems or self._weight_problems()
        if problems:
            listed = "".join(f"\n  - {problem}" for problem in problems)
            raise CheckpointUnsupported(f"{self.root} can't be converted honestly:{listed}")

    def _weight_problems(self) -> tuple[str, ...]:
        problems, effect = [], False
        for pair in self.pairs.values():
            a, b = self.read(pair)
            for spec, half in ((pair.a, a), (pair.b, b)):
                if not half.isfinite().all():
                    problems.append(f"{spec.name!r} holds NaN or Inf: take an earlier checkpoint of the run")
            effect = effect or bool(pair.scaling and a.any() and b.any())
        if not effect and not problems:
            problems.append("every delta is zero, so the adapter changes nothing: was it saved before the first step?")
        return tuple(problems)


def _require_adapter(root: Path) -> None:
    if (root / ADAPTER_CONFIG).is_file():
        return
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


def _halves(tensors: Tensors) -> tuple[dict[str, dict[str, TensorSpec]], list[str]]:
    halves: dict[str, dict[str, TensorSpec]] = {}
    problems = []
    for key, spec in tensors.specs.items():
        parsed = LoraKey.parse(key)
        if parsed is None:
            problems.append(f"{key!r} is {_reason(key)}")
        elif spec.dtype not in FLOATS or len(spec.shape) != 2 or 0 in spec.shape:
            problems.append(f"{key!r} is {spec.dtype} {list(spec.shape)}: expected a 2-D matrix of floats")
        elif parsed.half in halves.setdefault(parsed.module, {}):
            problems.append(f"{key!r} and {halves[parsed.module][parsed.half].name!r} are the same weight twice")
        else:
            halves[parsed.module][parsed.half] = spec
    return halves, problems


def _reason(key: str) -> str:
    plain = without_wrappers(key)
    return next((why for pattern, why in UNSUPPORTED_KEYS if pattern.search(plain)), UNKNOWN_KEY)


def _pair(module: str, halves: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> LoraPair | str:
    """The module's pair, or what is wrong with it."""
    if missing := {"A", "B"} - halves.keys():
        return f"{module}: lora_{missing.pop()} is missing, half a pair has no meaning"
    a, b = halves["A"], halves["B"]
    if a.shape[0] != b.shape[1]:
        return f"{module}: lora_A has rank {a.shape[0]}, lora_B rank {b.shape[1]}"
    try:
        rank = _of_module(config.get("rank_pattern"), module, config.get("r"))
        alpha = _of_module(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    except re.error as cause:
        return f"{module}: rank_pattern or alpha_pattern holds no valid pattern ({cause})"
    if rank != a.shape[0]:
        return f"{module}: {ADAPTER_CONFIG} says rank {rank!r}, the weights have {a.shape[0]}, so the scale is unknown"
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        return f"{module}: lora_alpha is {alpha!r}, not a number"
    return LoraPair(module, a, b, alpha, lora.scaling(alpha, rank, rslora=bool(config.get("use_rslora"))))


def _of_module(patterns: object, module: str, default: object) -> Any:
    """PEFT's rule: the first pattern that matches the end of the path, from a dot on."""
    if isinstance(patterns, dict):
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
    return default
