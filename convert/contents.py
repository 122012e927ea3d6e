"""What an adapter file holds: deltas of low rank, whole weights, rows of embeddings. Read from its header alone.

Every tensor of the file is one of these, or a problem, or named in a note. Which of them a route can follow is said
elsewhere (`Checkpoint.problems_for`, `edits`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from convert.formats import ADAPTER_CONFIG, EMBEDDING, HEAD, LAYER_LINEAR
from convert.keys import NATIVE_TARGETS, Key, Part, parse, reason
from convert.pairs import HALVES, LoraPair, pair_of
from convert.tensors import FLOATS, TensorSpec

EMBEDDING_MODULE = EMBEDDING.removesuffix(".weight")


@dataclass(frozen=True)
class Whole:
    """A weight as a whole. `beside`: a trained copy beside the base's own (modules_to_save), else the base's own."""

    spec: TensorSpec
    beside: bool


@dataclass(frozen=True)
class Rows:
    """Rows of an embedding or head that were trained, each replacing the row of that number."""

    indices: tuple[int, ...]
    values: TensorSpec


@dataclass(frozen=True)
class Contents:
    """`pairs` on linear layers, `embeddings` on embeddings, by module; `saved` and `rows` by the base's weight."""

    pairs: Mapping[str, LoraPair] = field(default_factory=dict)
    embeddings: Mapping[str, LoraPair] = field(default_factory=dict)
    saved: Mapping[str, Whole] = field(default_factory=dict)
    rows: Mapping[str, Rows] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    native: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any], specs: Mapping[str, TensorSpec], model: Mapping[str, Any]) -> Contents:
        """`config` is adapter_config.json, `model` the base's config.json where the trainer copied it, else empty."""
        found, problems = _by_module(specs)
        pairs: dict[str, LoraPair] = {}
        for module, halves in sorted(found.items()):
            if not any(part in halves for part in HALVES):
                continue
            pair = pair_of(module, halves, config, model)
            if isinstance(pair, str):
                problems.append(pair)
            else:
                pairs[module] = pair
        saved = dict(_saved(found, config))
        rows, row_problems = _rows(found, config)
        problems += row_problems
        problems += _magnitude_problems(found, pairs, config)
        problems += _absent(config, saved)
        return cls(
            pairs={module: pair for module, pair in pairs.items() if not pair.transposed},
            embeddings={module: pair for module, pair in pairs.items() if pair.transposed},
            saved=saved,
            rows=rows,
            problems=tuple(problems),
            notes=tuple(_notes(found, config, pairs)),
            native=any(key.native for parts in found.values() for key, _ in parts.values()),
        )

    @property
    def is_empty(self) -> bool:
        return not (self.pairs or self.embeddings or self.saved or self.rows)

    @property
    def specs(self) -> Iterator[TensorSpec]:
        """Every tensor that is used."""
        for pair in (*self.pairs.values(), *self.embeddings.values()):
            yield from pair.specs
        for whole in self.saved.values():
            yield whole.spec
        for rows in self.rows.values():
            yield rows.values


_Found = dict[str, dict[Part, tuple[Key, TensorSpec]]]


def _by_module(specs: Mapping[str, TensorSpec]) -> tuple[_Found, list[str]]:
    found: _Found = {}
    problems = []
    for name, spec in specs.items():
        key = parse(name)
        if key is None:
            problems.append(f"{name!r} is {reason(name)}")
        elif problem := _form_problem(name, key, spec):
            problems.append(problem)
        elif key.part is not Part.IGNORED and key.part in found.setdefault(key.module, {}):
            other = found[key.module][key.part][1].name
            problems.append(f"{name!r} and {other!r} are the same weight twice: save the adapter again")
        else:
            found.setdefault(key.module, {})[key.part] = key, spec
    return found, problems


def _form_problem(name: str, key: Key, spec: TensorSpec) -> str | None:
    if key.part is Part.IGNORED or (key.part is Part.BELOW and LAYER_LINEAR.fullmatch(key.module)):
        return None
    wanted = 1 if key.part in (Part.MAGNITUDE, Part.BIAS) else 2
    vector_allowed = key.part in (Part.WEIGHT, Part.SAVED)  # norms
    dimensions = len(spec.shape)
    fits = dimensions == wanted or (vector_allowed and dimensions == 1)
    if spec.dtype in FLOATS and fits and 0 not in spec.shape:
        return None
    gathered = (
        ". An empty or flat matrix was saved from a sharded run before its pieces were gathered: save it again"
        if key.part in HALVES
        else ". Save the adapter again in 16 or 32 bits"
    )
    form = "a vector" if wanted == 1 else "a matrix"
    return f"{name!r} is {spec.dtype} {list(spec.shape)}: expected {form} of bfloat16, float16 or float32{gathered}"


def _saved(found: _Found, config: Mapping[str, Any]) -> Iterator[tuple[str, Whole]]:
    names = _names(config.get("modules_to_save"))
    for module, parts in found.items():
        trained = any(module == name or module.endswith(f".{name}") for name in names)
        for part, (_, spec) in parts.items():
            if part is Part.BELOW and not LAYER_LINEAR.fullmatch(module):
                yield f"{module}.weight", Whole(spec, beside=False)
        for part in (Part.WEIGHT, Part.SAVED, Part.BIAS):  # a trained copy is what counts beside what lies below it
            if part in parts:
                key, spec = parts[part]
                yield key.weight, Whole(spec, beside=trained or part is Part.SAVED)


def _rows(found: _Found, config: Mapping[str, Any]) -> tuple[dict[str, Rows], list[str]]:
    setting = config.get("trainable_token_indices")
    stored = {module: parts[Part.ROWS][1] for module, parts in found.items() if Part.ROWS in parts}
    if not stored and not setting:
        return {}, []
    if not stored:
        return {}, ["trainable_token_indices names tokens, the file holds no rows of them: save the adapter again"]
    rows, problems = {}, []
    for module, spec in stored.items():
        indices = _indices(setting, module)
        if indices is None or len(indices) != spec.shape[0]:
            problems.append(
                f"{module}: {spec.shape[0]} trained rows are stored, trainable_token_indices of {ADAPTER_CONFIG} names "
                f"{'none' if indices is None else len(indices)}: put the {ADAPTER_CONFIG} of this run beside them"
            )
        else:
            rows[f"{module}.weight"] = Rows(indices, spec)
    return rows, problems


def _indices(setting: object, module: str) -> tuple[int, ...] | None:
    """The numbers of a module's rows. A bare list is about the embedding, and a head that is tied to it."""
    if isinstance(setting, dict):
        setting = next((ids for name, ids in setting.items() if module == name or module.endswith(f".{name}")), None)
    elif module not in (EMBEDDING_MODULE, HEAD):
        return None
    if not isinstance(setting, list) or not all(type(index) is int and index >= 0 for index in setting):
        return None
    return tuple(setting) if len(set(setting)) == len(setting) else None


def _magnitude_problems(found: _Found, pairs: Mapping[str, LoraPair], config: Mapping[str, Any]) -> Iterator[str]:
    dora = bool(config.get("use_dora"))
    magnitudes = [module for module, parts in found.items() if Part.MAGNITUDE in parts]
    if magnitudes and not dora:
        yield (
            f"{len(magnitudes)} modules have DoRA's lora_magnitude_vector, but use_dora is not set in "
            f"{ADAPTER_CONFIG}: set it to true if this was trained as DoRA"
        )
        return
    for module in magnitudes:
        pair = pairs.get(module)
        if pair is None:
            yield f"{module}: a DoRA magnitude without a LoRA pair has no meaning: save the adapter again"
        elif pair.transposed:
            yield f"{module}: DoRA on an embedding is not supported: train without it in target_modules"
        elif pair.magnitude and pair.magnitude.shape != (pair.out_features,):
            yield f"{module}: DoRA's magnitude has {pair.magnitude.shape[0]} rows, lora_B {pair.out_features}"
    if dora:
        for module, pair in pairs.items():
            if pair.magnitude is None:
                yield f"{module}: use_dora is set, but its lora_magnitude_vector is missing: save the adapter again"


def _absent(config: Mapping[str, Any], saved: Mapping[str, Whole]) -> Iterator[str]:
    """Modules that were trained as a whole and are not in the file."""
    modules = {name.rpartition(".")[0] for name in saved}
    for name in _names(config.get("modules_to_save")):
        if not any(module == name or module.endswith((f".{name}", name)) for module in modules):
            yield (
                f"modules_to_save names {name!r}, the file holds no weight of it: what was trained there is lost. "
                "Save the checkpoint again with PEFT's save_pretrained"
            )


def _names(setting: object) -> tuple[str, ...]:
    if isinstance(setting, str):
        return (setting,)
    return tuple(name for name in setting if isinstance(name, str)) if isinstance(setting, list) else ()


def _notes(found: _Found, config: Mapping[str, Any], pairs: Mapping[str, LoraPair]) -> Iterator[str]:
    keys = [key for parts in found.values() for key, _ in parts.values()]
    if repaired := sum(key.repaired for key in keys):
        yield f"the paths of {repaired} tensors were mended: vLLM would have ignored them without a word"
    if any(key.native for key in keys):
        yield "torchtune's own names and its order of rows were translated to those of transformers"
    below = [m for m, parts in found.items() if LAYER_LINEAR.fullmatch(m) and {Part.BELOW, Part.IGNORED} & parts.keys()]
    if below:
        yield f"copies of the base's own weights below {len(below)} adapted layers are left out"
    last = {module.rpartition(".")[2] for module in pairs}
    targets = {NATIVE_TARGETS.get(name, name).rpartition(".")[2] for name in _names(config.get("target_modules"))}
    known = {*NATIVE_TARGETS.values(), EMBEDDING_MODULE.rpartition(".")[2], HEAD}
    if unmatched := sorted((targets - last) & known):
        yield f"target_modules names {', '.join(unmatched)}, the file holds no weights for it"
