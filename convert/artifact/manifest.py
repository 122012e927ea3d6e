"""The format of manifest.json, which states the content of an artifact, its origin and its quality."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

SCHEMA = "graft.artifact/1"

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
# A name becomes a directory, a metric label and the `model` of a request, where `@` and `:` have a meaning.
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?$")]
# Without `..` and without a leading `/` or `.`: a manifest can't name a file outside its own directory.
RelativePath = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*$")
]
FileDigests = dict[RelativePath, Sha256]

# The values that vLLM accepts for max_lora_rank. An adapter of a rank between two values needs the larger one.
VLLM_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

QuantizationName = Literal["none", "nf4", "nf4-double", "w8a8-int8", "fp8-dynamic", "w4a16"]
RouteName = Literal["adapter", "merge", "rebase", "recover"]


class ManifestPart(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Model(ManifestPart):
    """A complete model directory, here or in another artifact with the same fingerprint."""

    path: Literal["model"] | None = Field(description="Its directory in the artifact; null: it is in another artifact.")
    fingerprint: Sha256 = Field(description="digest() of the model's files: the identity of a base model.")
    files: FileDigests = Field(description="Every file of the model with its SHA-256.")
    source: str = Field(description="The base model it was made from, as the checkpoint or the user names it.")
    quantization: QuantizationName = Field(description="How the linear layers are stored.")
    quantizer: str | None = Field(
        default=None, description="What quantized it: library, version, method, and what it was calibrated on."
    )
    size_bytes: int = Field(ge=0, description="Bytes of all its files.")


class Adapter(ManifestPart):
    """LoRA weights for one base."""

    path: Literal["adapter"] = "adapter"
    revision: Sha256 = Field(description="digest() of the adapter's files: its immutable identity.")
    files: FileDigests = Field(description="Every file of the adapter with its SHA-256.")
    rank: int = Field(ge=1, description="Largest rank of any module; the engine needs at least this max rank.")
    size_bytes: int = Field(ge=0)


class Origin(ManifestPart):
    """The checkpoint that was converted."""

    layout: str = Field(description="Which trainer's layout was recognised: peft, ms-swift, …")
    training: Literal["lora", "qlora"] = Field(description="Trained on full-precision or on 4-bit weights.")
    evidence: tuple[str, ...] = Field(description="The sources of that answer, in words.")
    confidence: str | None = Field(
        default=None, description="Of a measured answer its figure; null where a file or the user says it."
    )
    digest: Sha256 = Field(description="digest() of the checkpoint's adapter files.")


class Route(ManifestPart):
    """The route that was taken, and why."""

    name: RouteName
    requested: Literal["auto"] | RouteName
    merged_onto: Literal["original", "dequantized"] | None = Field(
        description="Which weights the adapter's delta was added to; null where nothing was merged."
    )
    reason: str = Field(description="The reason for the route variant, in a sentence.")


class Base(ManifestPart):
    """The base model that was used."""

    source: str = Field(description="As the checkpoint or the user names it; never a local path.")
    revision: str | None = Field(description="The revision the checkpoint names, where it names one.")
    files: FileDigests = Field(description="Its weights and configuration with their SHA-256.")


class Retention(ManifestPart):
    """The share of the delta that is in the written weights: their change, projected on the delta."""

    mean: float
    least: float
    least_module: str


class Canaries(ManifestPart):
    """Questions whose answers must contain what the fine-tune taught."""

    asked: int = Field(ge=1)
    passed: int = Field(ge=0)
    passed_as_trained: int | None = Field(default=None, ge=0, description="The same of the function as trained.")


class Quality(ManifestPart):
    """The loss against the function as trained, measured on held-out text."""

    reference: str = Field(description="What the result was compared with.")
    text: str = Field(description="Name of the text, or `default`.")
    tokens: int = Field(ge=1, description="Token positions compared.")
    kl_mean: float = Field(ge=0, description="Mean KL(reference || result) in nats per token.")
    kl_p99: float = Field(ge=0)
    top1_agreement: float = Field(ge=0, le=1, description="Share of positions with the same best token.")
    perplexity: float | None = Field(default=None, description="Perplexity of the result on the text.")
    perplexity_reference: float | None = Field(default=None, description="Perplexity of the function as trained.")
    perplexity_base: float | None = Field(default=None, description="Perplexity of the base without the adapter.")
    gain_kept: float | None = Field(
        default=None,
        description="Share of the fine-tune's gain in mean log-probability that the result keeps; null where the "
        "fine-tune gains nothing on this text.",
    )
    kl_base: float | None = Field(
        default=None, ge=0, description="Mean KL(reference || base alone): how far training moved the model."
    )
    distance_kept: float | None = Field(
        default=None, description="1 - kl_mean / kl_base, not below 0; null where the fine-tune changes nothing here."
    )
    retention: Retention | None = None
    canaries: Canaries | None = None


class Trial(ManifestPart):
    """One candidate that was built and measured while choosing."""

    route: RouteName
    quantization: QuantizationName
    size_bytes: int = Field(ge=0)
    quality: Quality | None
    verdict: str = Field(description="Why it was not published, in sentences.")


class Recovery(ManifestPart):
    """What distilling a QLoRA adapter back onto the full-precision weights reached, in mean KL on held-out text."""

    rank: int = Field(ge=1)
    steps: int = Field(ge=0)
    kl_naive: float = Field(ge=0, description="The adapter on the full-precision weights as it is.")
    kl_start: float = Field(ge=0, description="With the low-rank fit of the quantization error.")
    kl_recovered: float = Field(ge=0, description="After the last step.")


class Manifest(ManifestPart):
    """The content of manifest.json. It has no time of creation, so that the same input gives the same bytes."""

    schema_: Literal["graft.artifact/1"] = Field("graft.artifact/1", alias="schema")
    name: Name
    route: Route
    origin: Origin
    base: Base | None = None
    model: Model
    adapter: Adapter | None
    checkpoint: FileDigests | None = Field(
        default=None, description="Files of checkpoint/, a recovered LoRA that can be trained on."
    )
    quality: Quality | None
    trials: tuple[Trial, ...] = ()
    recovery: Recovery | None = None
    notes: tuple[str, ...] = Field(
        default=(), description="What was corrected, added or ignored, and what to know before serving it."
    )
    golden: Sha256 | None = Field(default=None, description="SHA-256 of golden.json, where there is one.")
    versions: dict[str, str] = Field(description="Versions of the libraries that made it.")


_LIST, _OBJECT = "a valid list", "an object of names and values"
# pydantic's kinds of errors that it words as a Python programmer would.
_EXPECTED = {
    **dict.fromkeys(("tuple_type", "list_type", "set_type", "frozen_set_type"), _LIST),
    **dict.fromkeys(("dict_type", "mapping_type", "model_type", "model_attributes_type", "dataclass_type"), _OBJECT),
    "path_type": "a path",
    "bytes_type": "a text",
    "none_required": "null",
}
_OF_PYTHON = re.compile(r"^(Tuple|Set|Frozenset|Dictionary|Mapping) should")


def problems_of(error: ValidationError) -> str:
    """Every field that was wrong and why, on one line."""
    places = ((".".join(map(str, problem["loc"])), reason_of(problem)) for problem in error.errors())
    return "; ".join(f"{place}: {reason}" if place else reason for place, reason in places)


def reason_of(problem: Mapping[str, Any]) -> str:
    """What one of pydantic's errors says, with the words for a file or a body instead of those of Python."""
    if expected := _EXPECTED.get(problem["type"]):
        return f"Input should be {expected}"
    words = {"Dictionary": "Object", "Mapping": "Object"}
    return _OF_PYTHON.sub(lambda match: f"{words.get(match[1], 'List')} should", str(problem["msg"]))
