"""The base model: the frozen weights that an adapter was trained on.

It is a model directory in Hugging Face's layout (config.json and safetensors), or an artifact, whose model/ is such a
directory. The weights are in 16 or 32 bits; linear layers may also be stored as NF4 by bitsandbytes, or in 8 or 4 bits
by compressed-tensors.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.artifact import MANIFEST, Artifact
from convert.artifact.file_names import CONFIG, GENERATION_CONFIG, MODEL_STEM, PROCESSOR_FILES, TOKENIZER_FILES
from convert.artifact.links import require_contained
from convert.errors import BaseMismatch, BaseUnreadable
from convert.inputs import model_config
from convert.inputs.architecture import Architecture, architecture_of, with_prefix
from convert.inputs.trainer_files import public_name
from convert.quantization.format import QuantizationFormat
from convert.quantization.linear import Linear, compressed_format_of, stored_linear
from convert.safetensors_io.directories import why_no_directory, why_no_model
from convert.safetensors_io.tensors import DTYPES, FLOATS, Tensors, TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = ["BaseModel", "Linear"]


@dataclass(frozen=True)
class BaseModel:
    """A base model whose configuration and headers have been read.

    `quantization_format`: that of its quantized linear layers; None where there are none. The tensors have the names of
    the family; `file_prefixes`: prefixes of these names, and those that they have in the files.
    """

    root: Path
    config: Mapping[str, Any]
    architecture: Architecture
    tensors: Tensors
    linears: Mapping[str, Linear]
    quantization_format: QuantizationFormat | None
    artifact: Artifact | None
    file_prefixes: Mapping[str, str]

    @classmethod
    def open(cls, path: Path) -> BaseModel:
        """Read configuration and headers.

        Raises BaseUnreadable, ArchitectureUnknown for another family, and BaseMismatch for a merged artifact.
        """
        artifact = Artifact.open(path) if (path / MANIFEST).is_file() else None
        root = _model_directory(artifact) if artifact else path
        if not root.is_dir():
            raise BaseUnreadable(why_no_directory(root, "a local model directory with --base"))
        require_contained(root, BaseUnreadable)
        if not (root / CONFIG).is_file():
            raise BaseUnreadable(why_no_model(root))
        config = model_config.read_config(root)
        in_files = Tensors.open(root, MODEL_STEM, BaseUnreadable)
        architecture = architecture_of(config, root)
        prefixes = architecture.file_prefixes(in_files.specs)
        of_files = {prefix: own for own, prefix in prefixes.items()}
        tensors = in_files.renamed({name: with_prefix(name, of_files) for name in in_files.specs})
        if architecture.other_parts:
            config = _with_stored_head(config, architecture, tensors)
        linears = _linears(root, config, architecture, tensors)
        _require_known(root, config["model_type"], architecture, tensors, linears)
        _require_complete(root, config, architecture, tensors, linears)
        formats = [linear.quantization_format for linear in linears.values() if linear.quantization_format]
        return cls(root, config, architecture, tensors, linears, formats[0] if formats else None, artifact, prefixes)

    @property
    def is_quantized(self) -> bool:
        return self.quantization_format is not None

    @property
    def quantization_name(self) -> str:
        """The format of its linear layers as manifests call it."""
        return self.quantization_format.name if self.quantization_format else "none"

    @property
    def embedding(self) -> TensorSpec:
        return self.tensors.specs[self.architecture.embedding]

    @property
    def vocabulary(self) -> int:
        """The number of rows of the embedding: every smaller token id has a row."""
        return self.embedding.shape[0]

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embedding."""
        return model_config.is_tied(self.config)

    @property
    def dtype(self) -> str:
        """The 16-bit type of models written from this one: the embedding's type, or BF16 for a float32 model."""
        dtype = self.embedding.dtype
        return "BF16" if dtype == "F32" else dtype

    @property
    def layer_linears(self) -> tuple[Linear, ...]:
        """The linear layers without the head."""
        return tuple(linear for linear in self.linears.values() if not linear.is_head)

    @property
    def other_specs(self) -> tuple[TensorSpec, ...]:
        """Every tensor that does not belong to a linear layer's weight: embeddings, norms, biases."""
        of_linears = {name for linear in self.linears.values() for name in linear.stored_names}
        return tuple(spec for name, spec in self.tensors.specs.items() if name not in of_linears)

    @property
    def language_specs(self) -> tuple[TensorSpec, ...]:
        """`other_specs` of the language model."""
        return tuple(spec for spec in self.other_specs if not self.architecture.is_other_part(spec.name))

    @property
    def other_part_specs(self) -> tuple[TensorSpec, ...]:
        """`other_specs` of the other parts of a multimodal model."""
        return tuple(spec for spec in self.other_specs if self.architecture.is_other_part(spec.name))

    @property
    def language_settings(self) -> Mapping[str, Any]:
        """The settings of the language model in config.json."""
        return model_config.language_settings(self.config)

    def file_name(self, name: str) -> str:
        """The name in files like the base's of a tensor of the family."""
        return with_prefix(name, self.file_prefixes)

    @property
    def tokenizer_files(self) -> tuple[Path, ...]:
        return self._present(TOKENIZER_FILES)

    @property
    def generation_files(self) -> tuple[Path, ...]:
        processors = PROCESSOR_FILES if self.architecture.other_parts else ()
        return self._present((GENERATION_CONFIG, *processors))

    def stored_specs(self, linear: Linear) -> tuple[TensorSpec, ...]:
        """The tensors in which a linear layer's weight is stored: one, or the parts of its quantization format."""
        return tuple(self.tensors.specs[name] for name in linear.stored_names)

    def read(self, linear: Linear) -> torch.Tensor:
        """The weight (out, in): as stored in floats, or dequantized to float32."""
        if linear.quantization_format is None:
            return self.tensors.read(linear.weight)
        parts = {spec.name: self.tensors.read(spec.name) for spec in self.stored_specs(linear)}
        return linear.quantization_format.dequantize(linear.module, parts)

    def read_for_quantizing(self, linear: Linear) -> torch.Tensor:
        """The weight in the 16-bit type that a model has when it is quantized while loading."""
        import torch

        return self.read(linear).to(getattr(torch, DTYPES[self.dtype][1]))

    def read_as_trained(self, linear: Linear, quantizer: QuantizationFormat | None) -> torch.Tensor:
        """The float32 weight that an adapter was trained against: quantized and dequantized, if there is a `quantizer`.

        Two weights are not quantized here: the head, and any weight of a base that is stored quantized already, since
        its quantizer left in floats what it did not quantize.
        """
        if quantizer is None or self.quantization_format or linear.is_head:
            return self.read(linear).float()
        parts = quantizer.quantize(linear.module, self.read_for_quantizing(linear))
        return quantizer.dequantize(linear.module, parts)

    def source(self, named_by_checkpoint: str | None) -> str:
        """A public name of this base, without a local path."""
        if self.artifact:
            return self.artifact.manifest.model.source
        return public_name(named_by_checkpoint) if named_by_checkpoint else public_name(str(self.root.resolve()))

    def _present(self, names: tuple[str, ...]) -> tuple[Path, ...]:
        return tuple(path for name in names if (path := self.root / name).is_file())


def _model_directory(artifact: Artifact) -> Path:
    manifest = artifact.manifest
    if manifest.route.name == "merge":
        model = shlex.quote(str(artifact.root / "model"))
        raise BaseMismatch(
            f"{artifact.root} is a merged model: another fine-tune is already in its weights. Give the base the "
            f"adapter was trained on. If that really is this merged model, give {model}."
        )
    if artifact.model_path is None:
        raise BaseUnreadable(
            f"{artifact.root} holds only an adapter; its base lies in another artifact "
            f"(fingerprint {manifest.model.fingerprint[:12]}…). Give that one."
        )
    return artifact.model_path


def _with_stored_head(config: dict[str, Any], architecture: Architecture, tensors: Tensors) -> dict[str, Any]:
    """The configuration of a multimodal model, untied where the files hold a head that is not the embedding.

    Its parts have settings of their own, which can contradict each other. transformers decides by the weights, too.
    """
    head, embedding = architecture.head_weight, architecture.embedding
    if head in tensors and embedding in tensors and not tensors.has_bytes_of(head, tensors, embedding):
        return model_config.with_own_head(config)
    return config


def _linears(root: Path, config: Mapping[str, Any], architecture: Architecture, tensors: Tensors) -> dict[str, Linear]:
    compressed_format = compressed_format_of(root, config, tensors, architecture.other_parts)
    linears = {}
    for module in sorted({module for name in tensors.specs if (module := _module_of_weight(name))}):
        if module == architecture.head:
            linears[module] = replace(stored_linear(root, tensors, module, None), is_head=True)
        elif architecture.layer_of(module) is not None:
            linears[module] = stored_linear(root, tensors, module, compressed_format)
    return linears


def _module_of_weight(name: str) -> str | None:
    """The module that a tensor is the weight of, or the codes of the weight."""
    module, _, part = name.rpartition(".")
    return module if part in ("weight", "weight_packed") else None


def _require_known(
    root: Path, model_type: str, architecture: Architecture, tensors: Tensors, linears: Mapping[str, Linear]
) -> None:
    of_linears = {name for linear in linears.values() for name in linear.stored_names}
    other_names = tensors.specs.keys() - of_linears
    unknown = sorted(
        name for name in other_names if not (architecture.has_other_weight(name) or architecture.is_other_part(name))
    )
    if unknown:
        raise BaseUnreadable(
            f"{root} is not built like {model_type}: {len(unknown)} tensors have no place there "
            f"({', '.join(map(repr, unknown[:3]))}…). Give the model as its publisher stores it, with its config.json."
        )


def _require_complete(
    root: Path,
    config: Mapping[str, Any],
    architecture: Architecture,
    tensors: Tensors,
    linears: Mapping[str, Linear],
) -> None:
    layers = model_config.language_settings(config)["num_hidden_layers"]
    modules = architecture.linears_of(layers) + ([] if model_config.is_tied(config) else [architecture.head])
    missing = [name for name in (architecture.embedding, architecture.final_norm) if name not in tensors]
    if missing := missing + [f"{module}.weight" for module in modules if module not in linears]:
        raise BaseUnreadable(
            f"{root} is an incomplete model: {len(missing)} tensors are missing ({', '.join(missing[:3])}…). "
            "Copy it again, whole."
        )
    embedding = tensors.specs[architecture.embedding]
    if embedding.dtype not in FLOATS or len(embedding.shape) != 2:
        raise BaseUnreadable(
            f"{root}: {embedding.name!r} is {embedding.dtype} {list(embedding.shape)}, not a matrix of floats"
        )
    if surplus := sorted(module for module in linears if (architecture.layer_of(module) or 0) >= layers):
        raise BaseUnreadable(f"{root} has weights of more layers than the {layers} of its config: {surplus[0]}…")
