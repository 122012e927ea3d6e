"""The base model: the frozen weights an adapter was trained on.

Either a model directory in Hugging Face's layout (config.json and safetensors), in 16 or 32 bits or with its
linear layers stored as NF4 by bitsandbytes; or an artifact, whose model/ is such a directory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert import nf4
from convert.artifact import MANIFEST, Artifact
from convert.errors import BaseMismatch, BaseUnreadable
from convert.formats import (
    CHAT_TEMPLATE_FILES,
    EMBEDDING,
    GENERATION_FILES,
    HEAD,
    LAYER_LINEAR,
    LAYER_LINEARS,
    MODEL_STEM,
    OTHER_WEIGHTS,
    TOKENIZER_FILES,
)
from convert.nf4 import Nf4
from convert.scheme import Scheme
from convert.tensors import DTYPES, FLOATS, Tensors, TensorSpec, read_json

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HUB_CACHE = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")
_MAX_STATE_BYTES = 1 << 16


@dataclass(frozen=True)
class Linear:
    """A linear layer. `weight` is its spec when stored as floats; `settings` is set when it is stored quantized."""

    module: str
    out_features: int
    in_features: int
    settings: Scheme | None

    @property
    def weight(self) -> str:
        return f"{self.module}.weight"

    @property
    def is_head(self) -> bool:
        return self.module == HEAD

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features


@dataclass(frozen=True)
class BaseModel:
    """A base model whose configuration and headers have been read."""

    root: Path
    config: Mapping[str, Any]
    tensors: Tensors
    linears: Mapping[str, Linear]
    settings: Scheme | None
    artifact: Artifact | None

    @classmethod
    def open(cls, path: Path) -> BaseModel:
        """Read configuration and headers. Raises BaseUnreadable, and BaseMismatch for a merged artifact."""
        artifact = Artifact.open(path) if (path / MANIFEST).is_file() else None
        root = _model_of(artifact) if artifact else path
        if not root.is_dir():
            raise BaseUnreadable(
                f"{root} is not a directory. --base takes a local model directory: download the model first, "
                f"for example with: hf download {path} --local-dir DIR"
            )
        config = read_json(root / CONFIG, BaseUnreadable)
        _require_known_quantization(root, config)
        tensors = Tensors.open(root, MODEL_STEM, BaseUnreadable)
        linears = _linears(root, tensors)
        _require_whole(root, config, tensors, linears)
        quantized = [linear.settings for linear in linears.values() if linear.settings]
        return cls(root, config, tensors, linears, quantized[0] if quantized else None, artifact)

    @property
    def is_quantized(self) -> bool:
        return self.settings is not None

    @property
    def quantization(self) -> str:
        """As manifests call it."""
        return self.settings.name if self.settings else "none"

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding: token ids below it have one."""
        return self.tensors.specs[EMBEDDING].shape[0]

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embedding."""
        return bool(self.config.get("tie_word_embeddings", False))

    @property
    def dtype(self) -> str:
        """The 16-bit type of what is written from it: its own, or BF16 for a float32 model."""
        stored = self.tensors.specs[EMBEDDING].dtype
        return "BF16" if stored == "F32" else stored

    @property
    def others(self) -> tuple[TensorSpec, ...]:
        """Everything that is not a linear layer's weight: embeddings, norms, biases."""
        linear = {linear.weight for linear in self.linears.values()}
        return tuple(
            spec for name, spec in self.tensors.specs.items() if not any(owner in linear for owner in _owners(name))
        )

    @property
    def tokenizer_files(self) -> tuple[Path, ...]:
        return self._present(TOKENIZER_FILES)

    @property
    def chat_template_files(self) -> tuple[Path, ...]:
        return self._present(CHAT_TEMPLATE_FILES)

    @property
    def generation_files(self) -> tuple[Path, ...]:
        return self._present(GENERATION_FILES)

    def stored(self, linear: Linear) -> tuple[TensorSpec, ...]:
        """The tensors a linear layer's weight is stored in: one, or the parts of NF4."""
        names = [linear.weight, *(f"{linear.weight}.{part}" for part in nf4.PARTS)]
        return tuple(self.tensors.specs[name] for name in names if name in self.tensors)

    def read(self, linear: Linear) -> torch.Tensor:
        """The weight (out, in): as stored in floats, or dequantized to float32."""
        if linear.settings is None:
            return self.tensors.read(linear.weight)
        parts = {spec.name: self.tensors.read(spec.name) for spec in self.stored(linear)}
        return linear.settings.dequantize(linear.module, parts)

    def read_for_quantizing(self, linear: Linear) -> torch.Tensor:
        """The weight in the 16-bit type that a model has when it is quantized while loading."""
        import torch

        return self.read(linear).to(getattr(torch, DTYPES[self.dtype][1]))

    def read_as_trained(self, linear: Linear, quantizer: Scheme | None) -> torch.Tensor:
        """The float32 weight an adapter was trained against: after NF4 and back, where `quantizer` is given.

        The head is never quantized, and a base stored as NF4 has been already: what it holds in floats was left so.
        """
        if quantizer is None or self.settings or linear.is_head:
            return self.read(linear).float()
        parts = quantizer.quantize(linear.module, self.read_for_quantizing(linear))
        return quantizer.dequantize(linear.module, parts)

    def source(self, named_by_checkpoint: str | None) -> str:
        """A name for this base that leaks no local path."""
        if self.artifact:
            return self.artifact.manifest.model.source
        return public_name(named_by_checkpoint) if named_by_checkpoint else public_name(str(self.root.resolve()))

    def _present(self, names: tuple[str, ...]) -> tuple[Path, ...]:
        return tuple(path for name in names if (path := self.root / name).is_file())


def public_name(name: str) -> str:
    """A hub id as it is; of a local path its last part, or the id that a hub cache directory stands for."""
    if _HUB_ID.fullmatch(name) and not Path(name).is_dir():
        return name
    for part in Path(name).parts:
        if match := _HUB_CACHE.fullmatch(part):
            return f"{match['owner']}/{match['name']}"
    return Path(name).name or "base"


def _model_of(artifact: Artifact) -> Path:
    manifest = artifact.manifest
    if manifest.route.name == "merge":
        raise BaseMismatch(
            f"{artifact.root} is a merged model: another fine-tune is already in its weights. Give the base the "
            f"adapter was trained on. If that really is this merged model, give {artifact.root / 'model'}."
        )
    if artifact.model_path is None:
        raise BaseUnreadable(
            f"{artifact.root} holds only an adapter; its base lies in another artifact "
            f"(fingerprint {manifest.model.fingerprint[:12]}…). Give that one."
        )
    return artifact.model_path


def _require_known_quantization(root: Path, config: Mapping[str, Any]) -> None:
    quantization = config.get("quantization_config")
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method != "bitsandbytes":
        raise BaseUnreadable(f"{root} is quantized by {method!r}. Give the original model, or one stored as NF4.")
    if quantization.get("bnb_4bit_quant_type") != "nf4" or not quantization.get("load_in_4bit"):
        kind = quantization.get("bnb_4bit_quant_type") if quantization.get("load_in_4bit") else "8-bit"
        raise BaseUnreadable(
            f"{root} is stored as {kind} by bitsandbytes. Give the original model, or one stored as NF4."
        )


def _owners(name: str) -> tuple[str, ...]:
    """The names of the weight a tensor may be a part of: itself, or `X.weight` of `X.weight.absmax`."""
    return (name, *(name.removesuffix(f".{part}") for part in nf4.PARTS if name.endswith(f".{part}")))


def _linears(root: Path, tensors: Tensors) -> dict[str, Linear]:
    linears: dict[str, Linear] = {}
    unknown: list[str] = []
    for name, spec in tensors.specs.items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and (LAYER_LINEAR.fullmatch(module) or module == HEAD):
            linears[module] = _linear(root, tensors, module, spec)
        elif name != EMBEDDING and not OTHER_WEIGHTS.fullmatch(name) and _owners(name)[-1] == name:
            unknown.append(name)
    if unknown:
        raise BaseUnreadable(
            f"{root} is not built like Llama: {len(unknown)} tensors have no place there "
            f"({', '.join(map(repr, sorted(unknown)[:3]))}…). Llama, Mistral and Qwen2 are supported."
        )
    return linears


def _linear(root: Path, tensors: Tensors, module: str, spec: TensorSpec) -> Linear:
    if f"{spec.name}.{nf4.STATE}" in tensors:
        return _quantized(root, tensors, module)
    if spec.dtype not in FLOATS or len(spec.shape) != 2 or 0 in spec.shape:
        raise BaseUnreadable(
            f"{root}: {spec.name!r} is {spec.dtype} {list(spec.shape)}; expected a matrix of bfloat16, float16 or "
            "float32, or NF4 with its quant_state. Give the original model, or one stored as NF4."
        )
    return Linear(module, spec.shape[0], spec.shape[1], None)


def _quantized(root: Path, tensors: Tensors, module: str) -> Linear:
    """An NF4 layer whose parts all have the sizes its state says: the dequantizer is native code."""
    name = f"{module}.weight"
    shape, dtype = _state(root, tensors, name)
    settings = Nf4(double=f"{name}.nested_absmax" in tensors, dtype=dtype)
    for expected in settings.specs(module, shape):
        if not expected.name.endswith(nf4.STATE) and tensors.specs.get(expected.name) != expected:
            raise BaseUnreadable(
                f"{root}: {expected.name!r} should be {expected.dtype} {list(expected.shape)} in NF4 "
                f"of shape {list(shape)}. Copy or save the model again."
            )
    return Linear(module, shape[0], shape[1], settings)


def _state(root: Path, tensors: Tensors, name: str) -> tuple[tuple[int, int], str]:
    """Shape and type of the weight before it was quantized."""
    key = f"{name}.{nf4.STATE}"
    try:
        if tensors.specs[key].nbytes > _MAX_STATE_BYTES:
            raise ValueError("too long")
        state = json.loads(b"".join(tensors.chunks(key)))
        rows, columns = state["shape"]
        if type(rows) is not int or type(columns) is not int or rows < 1 or columns < 1:
            raise ValueError(f"shape {state['shape']!r}")
        if state["quant_type"] != "nf4" or state["blocksize"] != 64 or state.get("nested_blocksize", 256) != 256:
            raise ValueError("not NF4 in blocks of 64")
        dtype = next(dtype for dtype in FLOATS if DTYPES[dtype][1] == state["dtype"])
        nested = ("nested_offset" in state, f"{name}.nested_absmax" in tensors)
        if nested[0] != nested[1] or (nested[0] and type(state["nested_offset"]) is not float):
            raise ValueError("nested_offset and nested_absmax must come together")
    except (ValueError, KeyError, TypeError, StopIteration, RecursionError) as cause:
        raise BaseUnreadable(
            f"{root}: {key!r} is not what bitsandbytes writes ({cause!r}). Save the model again."
        ) from None
    return (rows, columns), dtype


def _require_whole(root: Path, config: Mapping[str, Any], tensors: Tensors, linears: Mapping[str, Linear]) -> None:
    if not isinstance(config.get("model_type"), str):
        raise BaseUnreadable(f"{root / CONFIG} has no model_type. Copy the model's directory again, whole.")
    layers = config.get("num_hidden_layers")
    if type(layers) is not int or not 0 < layers <= 10_000:
        raise BaseUnreadable(f"{root / CONFIG} has no valid num_hidden_layers: {layers!r}")
    wanted = [EMBEDDING, "model.norm.weight"]
    wanted += [f"model.layers.{layer}.{name}.weight" for layer in range(layers) for name in LAYER_LINEARS]
    if not config.get("tie_word_embeddings", False):
        wanted.append(f"{HEAD}.weight")
    if missing := [name for name in wanted if name not in tensors]:
        raise BaseUnreadable(
            f"{root} is half a model: {len(missing)} tensors are missing ({', '.join(missing[:3])}…). "
            "Copy it again, whole."
        )
    embedding = tensors.specs[EMBEDDING]
    if embedding.dtype not in FLOATS or len(embedding.shape) != 2:
        raise BaseUnreadable(
            f"{root}: {EMBEDDING!r} is {embedding.dtype} {list(embedding.shape)}, not a matrix of floats"
        )
    if surplus := sorted(m for m in linears if (n := LAYER_LINEAR.fullmatch(m)) and int(n["layer"]) >= layers):
        raise BaseUnreadable(f"{root} has weights of more layers than the {layers} of its config: {surplus[0]}…")
