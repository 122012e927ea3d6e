"""The checkpoint: an adapter as a trainer left it.

    adapter_config.json           PEFT's settings: rank, alpha, target modules (`peft_settings`)
    adapter_model.safetensors     the tensors (`keys` parses their names, `adapter_state` sorts them)

and the files that the trainer writes beside them (`trainer_files`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from convert.artifact import VLLM_LORA_RANKS, digest, file_sha256
from convert.artifact.file_names import ADAPTER_CONFIG, ADAPTER_STEM, TOKENIZER_FILES
from convert.artifact.json_files import read_json
from convert.artifact.links import is_contained, require_contained, require_no_dangling
from convert.errors import CheckpointUnreadable, CheckpointUnsupported, one_for_each_cause
from convert.inputs import lora, trainer_files
from convert.inputs.adapter_state import AdapterState, SavedWeight, TrainedRows
from convert.inputs.architecture import Architecture, is_layer_linear
from convert.inputs.keys import TORCHTUNE_TARGETS
from convert.inputs.lora_weights import LoraWeights
from convert.inputs.peft_settings import setting_problems
from convert.inputs.sorted_keys import other_part_problem
from convert.safetensors_io.directories import checkpoints_below, gathering_problem, why_no_adapter, why_no_directory
from convert.safetensors_io.tensors import Tensors, TensorSpec, all_finite

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "LoraWeights", "SavedWeight", "TrainedRows"]

RouteName = Literal["adapter", "merge", "rebase", "recover"]


@dataclass(frozen=True)
class Checkpoint:
    """An adapter checkpoint whose settings and headers have been read.

    `layout`: the trainer that wrote it. `problems`: what no route can treat.
    """

    root: Path
    config: Mapping[str, Any]
    layout: str
    adapter_state: AdapterState
    problems: tuple[str, ...]
    tensors: Tensors

    @classmethod
    def open(cls, root: Path) -> Checkpoint:
        """Read the configuration and the headers, no weights. Raises CheckpointUnreadable."""
        root = _adapter_directory(root)
        require_contained(root, CheckpointUnreadable)
        config = read_json(root / ADAPTER_CONFIG, CheckpointUnreadable)
        tensors = _open_tensors(root)
        state = AdapterState.of(config, tensors.specs, trainer_files.base_config(root))
        gathering = gathering_problem(root, {name: spec.shape for name, spec in tensors.specs.items()})
        problems = setting_problems(config) + ([gathering] if gathering else list(state.problems))
        if state.is_empty and not problems:
            problems.append("the adapter file holds no LoRA weights: was it saved from the trained model?")
        layout = "torchtune" if state.is_torchtune else trainer_files.layout_of(root, config)
        return cls(root, config, layout, state, tuple(problems), tensors)

    def named_as(self, family: Architecture) -> Checkpoint:
        """The checkpoint with the family's names of the modules of a decoder (`AdapterState.named_as`). Raises
        CheckpointUnsupported if two modules get one name."""
        self._require_none(self.adapter_state.clashes(family))
        state = self.adapter_state.named_as(family)
        return self if state == self.adapter_state else replace(self, adapter_state=state)

    @property
    def lora_weights(self) -> Mapping[str, LoraWeights]:
        """LoRA weights of linear layers, by module."""
        return self.adapter_state.lora_weights

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was corrected or is unusual, and stops no route. Reads the weights once."""
        return self.adapter_state.warnings + self._weight_findings.warnings

    @property
    def all_problems(self) -> tuple[str, ...]:
        """`problems`; if there are none, the problems in the values of the weights. Reads the weights once."""
        return self.problems or self._weight_findings.problems

    @property
    def trained_besides_lora(self) -> str:
        """What was trained besides LoRA on linear layers, in words; empty where nothing was."""
        state = self.adapter_state
        counts = (
            (len(self._dora_modules), "DoRA magnitudes"),
            (len(state.saved_weights) - len(state.saved_biases), "whole weights"),
            (len(state.saved_biases), "biases"),
            (sum(len(rows.indices) for rows in state.trained_rows.values()), "token rows"),
            (len(state.embedding_lora_weights), "embedding deltas"),
        )
        return ", ".join(f"{count} {kind}" for count, kind in counts if count)

    def problems_for(self, route: RouteName) -> tuple[str, ...]:
        """Problems of this route alone, which another route can treat; `problems` are not repeated."""
        if route == "merge":
            return ()
        problems = self._adapter_problems() if route == "adapter" else self._refit_problems()
        return (*self._dora_problems(), *problems)

    @property
    def base_name(self) -> str | None:
        """The base model as the trainer names it: a hub id or a local path."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else trainer_files.repository_of(self.root)

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({weights.rank for weights in self.lora_weights.values()}))

    @property
    def alphas(self) -> tuple[float, ...]:
        return tuple(sorted({weights.alpha for weights in self.lora_weights.values()}))

    @property
    def targets(self) -> tuple[str, ...]:
        """Last parts of the adapted modules' paths, each once."""
        return tuple(sorted({module.rpartition(".")[2] for module in self.lora_weights}))

    @property
    def weight_bytes(self) -> int:
        return sum(spec.nbytes for spec in self.tensors.specs.values())

    @property
    def digest(self) -> str:
        """digest() of the adapter's own files, without the trainer's files beside them."""
        files = (self.root / ADAPTER_CONFIG, *self.tensors.files)
        return digest({path.name: file_sha256(path) for path in files})

    @property
    def tokenizer_files(self) -> tuple[Path, ...]:
        return tuple(path for name in TOKENIZER_FILES if (path := self.root / name).is_file())

    def read(self, weights: LoraWeights) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, in) and B (out, r) in the types they are stored in."""
        a, b = self.tensors.read(weights.a.name), self.tensors.read(weights.b.name)
        if weights.transposed:
            return a.T.contiguous(), b.T.contiguous()
        return a, lora.unpermute_rotary(b, weights.head_dim) if weights.head_dim else b

    @property
    def peft_settings(self) -> dict[str, Any]:
        """The settings of adapter_config.json, with PEFT's names of the target modules."""
        settings = dict(self.config)
        targets = settings.get("target_modules")
        if self.adapter_state.is_torchtune and isinstance(targets, list):
            settings["target_modules"] = sorted({TORCHTUNE_TARGETS.get(name, name) for name in targets})
        return settings

    def require_supported(self) -> None:
        """Raises CheckpointUnsupported with every problem: of settings, keys, shapes, then of the weights."""
        self._require_none(self.all_problems)

    def require_route(self, route: RouteName) -> None:
        """Raises CheckpointUnsupported with everything this route can't treat."""
        self._require_none(self.problems_for(route))

    def _require_none(self, problems: tuple[str, ...]) -> None:
        if problems:
            listed = "".join(f"\n  - {problem}" for problem in one_for_each_cause(problems))
            raise CheckpointUnsupported(f"{self.root} can't be converted correctly:{listed}")

    @property
    def _dora_modules(self) -> list[str]:
        return [module for module, weights in self.lora_weights.items() if weights.magnitude]

    def _dora_problems(self) -> Iterator[str]:
        if dora := self._dora_modules:
            yield (
                f"{len(dora)} modules are DoRA, which rescales the sum of base and delta, and vLLM doesn't load it as "
                "an adapter: merge it with --route merge"
            )

    def _refit_problems(self) -> Iterator[str]:
        """For the routes that compute a new adapter: rebase and recover."""
        state = self.adapter_state
        if state.embedding_lora_weights or state.saved_weights or state.trained_rows:
            others = "merge or adapter" if self.lora_weights else "merge"
            yield f"more was trained than LoRA on linear layers ({self.trained_besides_lora}): take --route {others}"

    def _adapter_problems(self) -> Iterator[str]:
        """For the route `adapter`, whose result vLLM loads as an adapter."""
        if large := [weights for weights in self.lora_weights.values() if weights.rank > VLLM_LORA_RANKS[-1]]:
            allowed = ", ".join(map(str, VLLM_LORA_RANKS))
            yield (
                f"{large[0].module} and {len(large) - 1} more have rank {max(weights.rank for weights in large)}; vLLM "
                f"serves adapters up to rank {VLLM_LORA_RANKS[-1]} ({allowed}): merge it with --route merge"
            )
        saved = self.adapter_state.saved_weights
        if linears := [name for name in saved if is_layer_linear(name.removesuffix(".weight"))]:
            yield f"{linears[0]} was trained as a full weight, which no adapter can hold: merge it with --route merge"
        if not self.lora_weights:
            yield "no LoRA weights on linear layers, so no adapter would remain: merge it with --route merge"

    @cached_property
    def _weight_findings(self) -> _WeightFindings:
        if self.problems:
            return _WeightFindings()
        state = self.adapter_state
        not_finite = tuple(
            f"{spec.name!r} holds NaN or Inf: take an earlier checkpoint of the run"
            for spec in state.specs
            if not all_finite(self.tensors.read(spec.name))
        )
        unequal = tuple(
            f"{first.name!r} and {second.name!r} are one weight with two values: save the adapter again"
            for first, second in state.doubled
            if not self.tensors.has_bytes_of(first.name, self.tensors, second.name)
        )
        if not_finite or unequal:
            return _WeightFindings(problems=not_finite + unequal)
        if trained := [module for module, specs in state.in_other_parts.items() if self._are_nonzero(specs)]:
            return _WeightFindings(problems=(other_part_problem(trained),))
        deltas = (*self.lora_weights.values(), *state.embedding_lora_weights.values())
        zero = [weights.module for weights in deltas if not self._has_effect(weights)]
        if len(zero) == len(deltas) and not state.saved_weights and not state.trained_rows:
            problem = "every delta is zero, so the adapter changes nothing: was it saved before the first step?"
            return _WeightFindings(problems=(problem,))
        warnings = [_zero_delta_warning(zero, len(deltas))] if zero else []
        if others := len(state.in_other_parts):
            warnings.append(f"{others} modules outside of the language model have a delta of zero, which is left out")
        return _WeightFindings(warnings=tuple(warnings))

    def _has_effect(self, weights: LoraWeights) -> bool:
        if weights.magnitude:
            return True
        return bool(weights.scaling and self._are_nonzero((weights.a, weights.b)))

    def _are_nonzero(self, specs: tuple[TensorSpec, ...]) -> bool:
        """Whether each tensor has an element that is not zero: NaN is none."""
        return all(bool(self.tensors.read(spec.name).any()) for spec in specs)


@dataclass(frozen=True)
class _WeightFindings:
    """Problems and warnings that only the values of the weights show."""

    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def _zero_delta_warning(modules: list[str], total: int) -> str:
    named = ", ".join(modules[:3]) + (", …" if len(modules) > 3 else "")
    return f"{len(modules)} of {total} adapted modules have a delta of zero, so nothing was learnt there: {named}"


def _adapter_directory(root: Path) -> Path:
    """The directory of the adapter's own files. Raises CheckpointUnreadable."""
    if root.is_dir():
        require_no_dangling(root, CheckpointUnreadable)
    if (root / ADAPTER_CONFIG).is_file():
        return root
    named = root / "default"  # ms-swift 1 saves the adapter in a directory of its name
    if (named / ADAPTER_CONFIG).is_file() and is_contained(named):
        return named
    if not root.is_dir():
        raise CheckpointUnreadable(why_no_directory(root, f"the directory that holds {ADAPTER_CONFIG}"))
    raise CheckpointUnreadable(why_no_adapter(root))


def _open_tensors(root: Path) -> Tensors:
    """Raises CheckpointUnreadable, which names checkpoints below a directory whose own weights are missing."""
    try:
        return Tensors.open(root, ADAPTER_STEM, CheckpointUnreadable)
    except CheckpointUnreadable as error:
        below = checkpoints_below(root)
        raise CheckpointUnreadable(f"{error} {below}" if below else str(error)) from None
