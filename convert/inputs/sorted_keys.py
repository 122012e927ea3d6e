"""The tensors of an adapter file, sorted by their keys and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from convert.inputs.architecture import is_layer_linear, is_other_part
from convert.inputs.keys import Key, Part, parse, why_unknown
from convert.inputs.lora_weights import LORA_PARTS
from convert.safetensors_io.tensors import FLOATS, TensorSpec

Modules = dict[str, dict[Part, tuple[Key, TensorSpec]]]
"""The tensors of an adapter file: by module, then by their role in it."""


@dataclass(frozen=True)
class SortedKeys:
    """By module and role; `base_layers`, `doubled`, `unread` and `in_other_parts` as in `AdapterState`.

    `problems`: keys and shapes that don't fit.
    """

    modules: Modules
    base_layers: Mapping[str, TensorSpec]
    unread: frozenset[str]
    in_other_parts: Mapping[str, tuple[TensorSpec, ...]]
    problems: tuple[str, ...]

    @classmethod
    def of(cls, specs: Mapping[str, TensorSpec]) -> SortedKeys:
        modules: Modules = {}
        base_layers: dict[str, TensorSpec] = {}
        unread, problems = set(), []
        for name, spec in specs.items():
            key = parse(name)
            if key and key.part is Part.UNREAD:
                unread.add(name)
            elif key and key.part in (Part.BASE_LAYER, Part.BASE_LAYER_PIECE) and is_layer_linear(key.module):
                base_layers[f"{key.module}.{name.rpartition('base_layer.')[2]}"] = spec
            elif problem := _key_problem(name, key, spec, modules):
                problems.append(problem)
            elif key:
                modules.setdefault(key.module, {})[key.part] = key, spec
        others = {module: modules.pop(module) for module in list(modules) if is_other_part(module)}
        # Whether LoRA weights have an effect, their values say. Anything else has one.
        if trained := [module for module, parts in others.items() if not parts.keys() <= {Part.A, Part.B}]:
            problems.append(other_part_problem(trained))
        in_other_parts = {module: tuple(spec for _, spec in parts.values()) for module, parts in others.items()}
        return cls(modules, base_layers, frozenset(unread), in_other_parts, tuple(problems))

    @property
    def doubled(self) -> tuple[tuple[TensorSpec, TensorSpec], ...]:
        """PEFT saves a trained copy of a resized embedding a second time, under its name in the wrapper."""
        return tuple(
            (parts[Part.SAVED][1], parts[Part.WEIGHT][1])
            for parts in self.modules.values()
            if Part.SAVED in parts and Part.WEIGHT in parts
        )


def other_part_problem(modules: Sequence[str]) -> str:
    """Why an adapter is refused that changes these modules of a multimodal model."""
    more = f" and {len(modules) - 1} more modules" if len(modules) > 1 else ""
    return (
        f"{modules[0]}{more} outside of the language model were trained, and only the language model is converted. "
        "Train that alone: PEFT's exclude_modules leaves the others out"
    )


def _key_problem(name: str, key: Key | None, spec: TensorSpec, modules: Modules) -> str | None:
    if key is None or key.part is Part.BASE_LAYER_PIECE:
        return f"{name!r} is {why_unknown(name)}"
    if key.part in modules.get(key.module, {}):
        first = modules[key.module][key.part][1].name
        return f"{name!r} and {first!r} are the same weight twice: save the adapter again"
    return _shape_problem(name, key, spec)


def _shape_problem(name: str, key: Key, spec: TensorSpec) -> str | None:
    is_vector = key.part in (Part.MAGNITUDE, Part.BIAS)
    may_be_vector = is_vector or key.part in (Part.WEIGHT, Part.SAVED)  # a norm's weight is a vector
    fits = (len(spec.shape) == 1 and may_be_vector) or (len(spec.shape) == 2 and not is_vector)
    if spec.dtype in FLOATS and fits and 0 not in spec.shape:
        return None
    advice = (
        "An empty or flat matrix was saved from a sharded run before its pieces were gathered: save it again"
        if key.part in LORA_PARTS
        else "Save the adapter again in 16 or 32 bits"
    )
    expected = "a vector" if is_vector else "a matrix"
    return f"{name!r} is {spec.dtype} {list(spec.shape)}: expected {expected} of bfloat16, float16 or float32. {advice}"
