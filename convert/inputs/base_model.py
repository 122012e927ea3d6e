"""The base model: the frozen weights an adapter was trained on.

Either a model directory in Hugging Face's layout (config.json and safetensors), in 16 or 32 bits or with its linear
layers stored as NF4 by bitsandbytes or in 8 or 4 bits by compressed-tensors; or an artifact, whose model/ is such a
directory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert import compressed, nf4
from convert.artifact import MANIFEST, Artifact
from convert.compressed import Compressed
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
from convert.scheme import Scheme
from convert.tensors import DTYPES, FLOATS, Tensors, TensorSpec, read_json

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HUB_CACHE = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")


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
        tensors = Tensors.open(root, MODEL_STEM, BaseUnreadable)
        linears = _linears(root, tensors, _compressed(root, config, tensors))
        _require_known(root, tensors, linears)
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
        stored = {name for linear in self.linears.values() for name in _stored_names(linear)}
        return tuple(spec for name, spec in self.tensors.specs.items() if name not in stored)

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
        """The tensors a linear layer's weight is stored in: one, or the parts of its scheme."""
        return tuple(self.tensors.specs[name] for name in _stored_names(linear))

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


def _compressed(root: Path, config: Mapping[str, Any], tensors: Tensors) -> Compressed | None:
    """The scheme of compressed-tensors that the configuration names. Raises BaseUnreadable for what can't be read."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method == compressed.METHOD:
        return compressed.recognised(root, quantization, tensors)
    if method != "bitsandbytes":
        raise BaseUnreadable(
            f"{root} is quantized by {method!r}. Give the original model, or one stored as NF4 or by "
            f"{compressed.METHOD} as {', '.join(compressed.NAMES)}."
        )
    nf4.require_nf4(root, quantization)
    return None


def _linears(root: Path, tensors: Tensors, settings: Compressed | None) -> dict[str, Linear]:
    modules = sorted({module for name in tensors.specs if (module := _module(name))})
    return {module: _linear(root, tensors, module, settings) for module in modules}


def _module(name: str) -> str | None:
    """The linear layer whose weight this is, or whose codes these are."""
    module, _, part = name.rpartition(".")
    is_linear = LAYER_LINEAR.fullmatch(module) or module == HEAD
    return module if is_linear and part in ("weight", "weight_packed") else None


def _linear(root: Path, tensors: Tensors, module: str, settings: Compressed | None) -> Linear:
    if settings and module != HEAD:
        return Linear(module, *compressed.stored_shape(root, tensors, module, settings), settings)
    if f"{module}.weight.{nf4.STATE}" in tensors:
        quantizer, shape = nf4.stored_layer(root, tensors, module)
        return Linear(module, *shape, quantizer)
    spec = tensors.specs.get(f"{module}.weight")
    if spec is None or spec.dtype not in FLOATS or len(spec.shape) != 2 or 0 in spec.shape:
        found = f"{spec.dtype} {list(spec.shape)}" if spec else "packed"
        raise BaseUnreadable(
            f"{root}: '{module}.weight' is {found}; expected a matrix of bfloat16, float16 or float32, or NF4 with "
            "its quant_state. Give the original model, or one stored as NF4."
        )
    return Linear(module, spec.shape[0], spec.shape[1], None)


def _require_known(root: Path, tensors: Tensors, linears: Mapping[str, Linear]) -> None:
    stored = {name for linear in linears.values() for name in _stored_names(linear)}
    unknown = [
        name for name in tensors.specs if name not in stored and name != EMBEDDING and not OTHER_WEIGHTS.fullmatch(name)
    ]
    if unknown:
        raise BaseUnreadable(
            f"{root} is not built like Llama: {len(unknown)} tensors have no place there "
            f"({', '.join(map(repr, sorted(unknown)[:3]))}…). Llama, Mistral and Qwen2 are supported."
        )


def _stored_names(linear: Linear) -> tuple[str, ...]:
    if linear.settings is None:
        return (linear.weight,)
    return tuple(spec.name for spec in linear.settings.specs(linear.module, linear.shape))


def _require_whole(root: Path, config: Mapping[str, Any], tensors: Tensors, linears: Mapping[str, Linear]) -> None:
    if not isinstance(config.get("model_type"), str):
        raise BaseUnreadable(f"{root / CONFIG} has no model_type. Copy the model's directory again, whole.")
    layers = config.get("num_hidden_layers")
    if type(layers) is not int or not 0 < layers <= 10_000:
        raise BaseUnreadable(f"{root / CONFIG} has no valid num_hidden_layers: {layers!r}")
    wanted = [EMBEDDING, "model.norm.weight"]
    modules = [f"model.layers.{layer}.{name}" for layer in range(layers) for name in LAYER_LINEARS]
    if not config.get("tie_word_embeddings", False):
        modules.append(HEAD)
    missing = [name for name in wanted if name not in tensors]
    missing += [f"{module}.weight" for module in modules if module not in linears]
    if missing:
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
