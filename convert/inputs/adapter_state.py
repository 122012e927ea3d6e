"""What an adapter file holds, known from its header: LoRA weights, saved weights, trained rows of embeddings.

Every tensor of the file is used, is compared with another one, or is a problem: none is passed over.
`Checkpoint.problems_for` says which of them a route can treat.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from convert.artifact.file_names import ADAPTER_CONFIG
from convert.inputs.architecture import EMBEDDING_MODULES, HEAD_MODULES, LINEARS, Architecture
from convert.inputs.keys import TORCHTUNE_TARGETS, Part
from convert.inputs.lora_weights import LORA_PARTS, LoraWeights, LoraWeightsInvalid, lora_weights_of
from convert.inputs.patterns import PatternInvalid, require_quick, unmatched_patterns
from convert.inputs.sorted_keys import Modules, SortedKeys
from convert.safetensors_io.tensors import TensorSpec


@dataclass(frozen=True)
class SavedWeight:
    """A complete weight in the adapter file.

    `is_trained_copy`: PEFT trained it as a copy and kept the base's own weight as it was (modules_to_save). False: it
    is the base's own weight, saved with the adapter.
    """

    spec: TensorSpec
    is_trained_copy: bool


@dataclass(frozen=True)
class TrainedRows:
    """Trained rows of an embedding or head: row n of `values` replaces row `indices[n]` of the base's weight."""

    indices: tuple[int, ...]
    values: TensorSpec


@dataclass(frozen=True)
class AdapterState:
    """LoRA weights by module, saved weights and trained rows by the name of the base's weight.

    `base_layers`: copies of the base's own weights below adapted layers, by the name of the base's tensor. `doubled`:
    pairs of tensors that stand for one saved weight. `unread`: names of tensors that the function as trained does not
    read. `in_other_parts`: those of LoRA outside of a multimodal model's language model, by module. `problems` stop a
    conversion, `warnings` don't. `is_torchtune`: the file has torchtune's own names.
    """

    lora_weights: Mapping[str, LoraWeights] = field(default_factory=dict)
    embedding_lora_weights: Mapping[str, LoraWeights] = field(default_factory=dict)
    saved_weights: Mapping[str, SavedWeight] = field(default_factory=dict)
    trained_rows: Mapping[str, TrainedRows] = field(default_factory=dict)
    base_layers: Mapping[str, TensorSpec] = field(default_factory=dict)
    doubled: tuple[tuple[TensorSpec, TensorSpec], ...] = ()
    unread: frozenset[str] = frozenset()
    in_other_parts: Mapping[str, tuple[TensorSpec, ...]] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    is_torchtune: bool = False

    @classmethod
    def of(
        cls,
        adapter_config: Mapping[str, Any],
        specs: Mapping[str, TensorSpec],
        base_config: Mapping[str, Any],
    ) -> AdapterState:
        """Sort the tensors of an adapter file. `base_config`: the base's config.json, {} where no trainer copied it."""
        sorted_keys = SortedKeys.of(specs)
        modules, problems = sorted_keys.modules, list(sorted_keys.problems)
        try:
            require_quick(adapter_config, _paths(modules))
        except PatternInvalid as invalid:
            return cls(problems=(str(invalid),))
        lora_weights, lora_problems = _lora_weights(modules, adapter_config, base_config)
        saved_weights = dict(_saved_weights(modules, adapter_config))
        trained_rows, row_problems = _trained_rows(modules, adapter_config)
        problems += lora_problems + row_problems
        problems += _magnitude_problems(modules, lora_weights, adapter_config)
        problems += _missing_modules_to_save(adapter_config, saved_weights)
        state = cls(
            lora_weights={module: weights for module, weights in lora_weights.items() if not weights.transposed},
            embedding_lora_weights={module: weights for module, weights in lora_weights.items() if weights.transposed},
            saved_weights=saved_weights,
            trained_rows=trained_rows,
            base_layers=sorted_keys.base_layers,
            doubled=sorted_keys.doubled,
            unread=sorted_keys.unread,
            in_other_parts=sorted_keys.in_other_parts,
            warnings=tuple(_warnings(sorted_keys, adapter_config, lora_weights)),
            is_torchtune=any(key.is_torchtune for parts in modules.values() for key, _ in parts.values()),
        )
        return replace(state, problems=tuple(problems) or tuple(state._unused_problems(specs)))

    def named_as(self, family: Architecture) -> AdapterState:
        """The state with the names that the family has for the modules of a decoder.

        An adapter of a multimodal model has those of a text model, too: of the text model it was cut out of, or of an
        older version of transformers.
        """
        own = family.own_name
        return replace(
            self,
            lora_weights=_renamed(self.lora_weights, family),
            embedding_lora_weights=_renamed(self.embedding_lora_weights, family),
            saved_weights={own(name): saved for name, saved in self.saved_weights.items()},
            trained_rows={own(name): rows for name, rows in self.trained_rows.items()},
            base_layers={own(name): spec for name, spec in self.base_layers.items()},
        )

    def clashes(self, family: Architecture) -> tuple[str, ...]:
        """Problems: modules that have one name in the family, so that one would take the other's place."""
        named = (self.lora_weights, self.embedding_lora_weights, self.saved_weights, self.trained_rows)
        counted = [Counter(map(family.own_name, modules)) for modules in named]
        twice = sorted({module for counts in counted for module, count in counts.items() if count > 1})
        return tuple(f"two modules of the adapter stand for {module}: keep one" for module in twice)

    @property
    def is_empty(self) -> bool:
        return not (self.lora_weights or self.embedding_lora_weights or self.saved_weights or self.trained_rows)

    @property
    def saved_biases(self) -> tuple[str, ...]:
        return tuple(name for name in self.saved_weights if name.endswith(".bias"))

    @property
    def specs(self) -> Iterator[TensorSpec]:
        """Every tensor that is used."""
        for weights in (*self.lora_weights.values(), *self.embedding_lora_weights.values()):
            yield from weights.specs
        for saved in self.saved_weights.values():
            yield saved.spec
        for rows in self.trained_rows.values():
            yield rows.values

    def _unused_problems(self, specs: Mapping[str, TensorSpec]) -> Iterator[str]:
        compared = {spec.name for spec in (*self.base_layers.values(), *(second for _, second in self.doubled))}
        compared |= {spec.name for of_module in self.in_other_parts.values() for spec in of_module}
        for name in sorted(specs.keys() - {spec.name for spec in self.specs} - compared - self.unread):
            yield f"{name!r} has no use beside the other tensors of its module: save the adapter again"


def _renamed(lora_weights: Mapping[str, LoraWeights], family: Architecture) -> dict[str, LoraWeights]:
    renamed = (replace(weights, module=family.own_name(module)) for module, weights in lora_weights.items())
    return {weights.module: weights for weights in renamed}


def _paths(modules: Modules) -> Iterator[str]:
    """The paths of all modules of the file in the model that was trained, and of the modules around them."""
    for parts in modules.values():
        for key, _ in parts.values():
            path = key.trained_path
            while path:
                yield path
                path = path.rpartition(".")[0]


def _lora_weights(
    modules: Modules, adapter_config: Mapping[str, Any], base_config: Mapping[str, Any]
) -> tuple[dict[str, LoraWeights], list[str]]:
    lora_weights, problems = {}, []
    for module, parts in sorted(modules.items()):
        if any(part in parts for part in LORA_PARTS):
            try:
                lora_weights[module] = lora_weights_of(module, parts, adapter_config, base_config)
            except LoraWeightsInvalid as invalid:
                problems.append(str(invalid))
    return lora_weights, problems


def _saved_weights(modules: Modules, adapter_config: Mapping[str, Any]) -> Iterator[tuple[str, SavedWeight]]:
    """By the name of the base's weight. A trained copy comes last, so that it wins over the base's own weight."""
    modules_to_save = _names(adapter_config.get("modules_to_save"))
    for module, parts in modules.items():
        listed = any(_is_named(module, name) for name in modules_to_save)
        if Part.BASE_LAYER in parts:
            yield f"{module}.weight", SavedWeight(parts[Part.BASE_LAYER][1], is_trained_copy=False)
        for part in (Part.WEIGHT, Part.SAVED, Part.BIAS):
            if part in parts:
                key, spec = parts[part]
                yield key.weight, SavedWeight(spec, is_trained_copy=listed or part is Part.SAVED)


def _trained_rows(modules: Modules, adapter_config: Mapping[str, Any]) -> tuple[dict[str, TrainedRows], list[str]]:
    setting = adapter_config.get("trainable_token_indices")
    stored = {module: parts[Part.TRAINED_ROWS][1] for module, parts in modules.items() if Part.TRAINED_ROWS in parts}
    if setting and not stored:
        return {}, ["trainable_token_indices names tokens, the file holds no rows of them: save the adapter again"]
    trained_rows, problems = {}, []
    for module, spec in stored.items():
        indices = _token_indices(setting, module)
        if indices is None or len(indices) != spec.shape[0]:
            problems.append(
                f"{module}: {spec.shape[0]} trained rows are stored, trainable_token_indices of {ADAPTER_CONFIG} names "
                f"{'none' if indices is None else len(indices)}: put the {ADAPTER_CONFIG} of this run beside them"
            )
        else:
            trained_rows[f"{module}.weight"] = TrainedRows(indices, spec)
    return trained_rows, problems


def _token_indices(setting: object, module: str) -> tuple[int, ...] | None:
    """The trained rows of a module; None where the setting gives no valid list for it.

    A list without a module's name stands for the embedding, and for a head that is tied to it.
    """
    if isinstance(setting, dict):
        setting = next((indices for name, indices in setting.items() if _is_named(module, name)), None)
    elif module not in EMBEDDING_MODULES | HEAD_MODULES:
        return None
    if not isinstance(setting, list) or not all(type(index) is int and index >= 0 for index in setting):
        return None
    return tuple(setting) if len(set(setting)) == len(setting) else None


def _magnitude_problems(
    modules: Modules, lora_weights: Mapping[str, LoraWeights], adapter_config: Mapping[str, Any]
) -> Iterator[str]:
    with_magnitude = [module for module, parts in modules.items() if Part.MAGNITUDE in parts]
    if adapter_config.get("use_dora"):
        for module in with_magnitude:
            yield from _magnitude_problem(module, lora_weights.get(module))
        for module, weights in lora_weights.items():
            if weights.magnitude is None:
                yield f"{module}: use_dora is set, but its lora_magnitude_vector is missing: save the adapter again"
    elif with_magnitude:
        yield (
            f"{len(with_magnitude)} modules have DoRA's lora_magnitude_vector, but use_dora is not set in "
            f"{ADAPTER_CONFIG}: set it to true if this was trained as DoRA"
        )


def _magnitude_problem(module: str, weights: LoraWeights | None) -> Iterator[str]:
    if weights is None:
        yield f"{module}: a DoRA magnitude needs LoRA weights, and they are missing: save the adapter again"
    elif weights.transposed:
        yield f"{module}: DoRA on an embedding is not supported: train without it in target_modules"
    elif weights.magnitude and weights.magnitude.shape != (weights.out_features,):
        yield f"{module}: DoRA's magnitude has {weights.magnitude.shape[0]} rows, lora_B {weights.out_features}"


def _missing_modules_to_save(
    adapter_config: Mapping[str, Any], saved_weights: Mapping[str, SavedWeight]
) -> Iterator[str]:
    modules = {name.rpartition(".")[0] for name in saved_weights}
    for name in _names(adapter_config.get("modules_to_save")):
        if not any(module.endswith(name) for module in modules):
            yield (
                f"modules_to_save names {name!r}, the file holds no weight of it: what was trained there is lost. "
                "Save the checkpoint again with PEFT's save_pretrained"
            )


def _warnings(
    sorted_keys: SortedKeys, adapter_config: Mapping[str, Any], lora_weights: Mapping[str, LoraWeights]
) -> Iterator[str]:
    modules = sorted_keys.modules
    keys = [key for parts in modules.values() for key, _ in parts.values()]
    if corrected := sum(key.is_corrected for key in keys):
        yield f"the paths of {corrected} tensors were corrected: vLLM would have ignored these tensors silently"
    if any(key.is_torchtune for key in keys):
        yield "torchtune's own names and its order of rows were translated to those of transformers"
    if copies := [name for name in sorted_keys.base_layers if name.endswith(".weight")]:
        yield f"the base's own weights of {len(copies)} adapted layers are in the file too; they are left out"
    for pattern in unmatched_patterns(adapter_config, (weights.trained_path for weights in lora_weights.values())):
        yield f"{pattern!r} matches no adapted module, so that training ignored it: is it a typing error?"
    if untrained := _targets_without_weights(adapter_config, lora_weights):
        yield f"target_modules names {', '.join(untrained)}, the file holds no weights for it"


def _targets_without_weights(adapter_config: Mapping[str, Any], lora_weights: Mapping[str, LoraWeights]) -> list[str]:
    """Modules of the families known here that target_modules names and that have no LoRA weights."""
    adapted = {_last_part(module) for module in lora_weights}
    targets = {_last_part(TORCHTUNE_TARGETS.get(n, n)) for n in _names(adapter_config.get("target_modules"))}
    known = {_last_part(name) for name in (*LINEARS, *EMBEDDING_MODULES, *HEAD_MODULES)}
    return sorted((targets - adapted) & known)


def _names(setting: object) -> tuple[str, ...]:
    """The names in a setting of PEFT that is a name, a list of names, or something else."""
    if isinstance(setting, str):
        return (setting,)
    return tuple(name for name in setting if isinstance(name, str)) if isinstance(setting, list) else ()


def _is_named(module: str, name: object) -> bool:
    """PEFT's rule: a name in a setting stands for every module whose path ends with it, from a dot on."""
    return module == name or module.endswith(f".{name}")


def _last_part(path: str) -> str:
    return path.rpartition(".")[2]
