"""The artifact: the directory that `convert` publishes and `serve` reads, and its manifest.

    DIR/manifest.json      this contract
    DIR/model/             a complete model directory: the merged model, or the 4-bit base of the adapter
    DIR/checkpoint/        a recovered LoRA checkpoint; only where one was made
    DIR/golden.json        prompts with the answers that a server of this artifact must give
    DIR/adapter/           adapter_config.json and adapter_model.safetensors (PEFT's layout); only where
                           the adapter stays separate

The 4-bit base of an adapter may live in another artifact: then `model.path` is None and `model.fingerprint`
says which base it must be. This module needs nothing but pydantic: the serving side imports it alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from convert.errors import ArtifactInvalid

SCHEMA = "graft.artifact/1"
MANIFEST = "manifest.json"
MODEL_DIR = "model"
ADAPTER_DIR = "adapter"
GOLDEN = "golden.json"
# Some chat templates, Llama 3.2's among them, write today's date into every chat. Golden answers must not depend on
# the day: these are the arguments that their templates were given, and that a server which is compared must give.
GOLDEN_CHAT_ARGUMENTS: Mapping[str, str] = {"date_string": "26 Jul 2024"}

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
# A name becomes a directory, a metric label and the `model` of a request: `@` and `:` are left out on purpose.
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?$")]
# Relative, no parent steps, no hidden parts: a manifest can't point outside its own directory.
RelativePath = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*$")
]
FileDigests = dict[RelativePath, Sha256]

_READ_BYTES = 1 << 20


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


QuantizationName = Literal["none", "nf4", "nf4-double", "w8a8-int8", "fp8-dynamic", "w4a16"]
RouteName = Literal["adapter", "merge", "rebase", "recover"]


class Model(_Part):
    """A complete model directory, or a reference to one by its fingerprint."""

    path: Literal["model"] | None = Field(description="Where it lies in the artifact; null: in another artifact.")
    fingerprint: Sha256 = Field(description="digest() of the model's files: the identity of a base model.")
    files: FileDigests = Field(description="Every file of the model with its SHA-256.")
    source: str = Field(description="The base model it was made from, as the checkpoint or the user names it.")
    quantization: QuantizationName = Field(description="How the linear layers are stored.")
    quantizer: str | None = Field(
        default=None, description="What quantized it: library, version, method, and what it was calibrated on."
    )
    size_bytes: int = Field(ge=0, description="Bytes of all its files.")


class Adapter(_Part):
    """LoRA weights for one base."""

    path: Literal["adapter"] = "adapter"
    revision: Sha256 = Field(description="digest() of the adapter's files: its immutable identity.")
    files: FileDigests = Field(description="Every file of the adapter with its SHA-256.")
    rank: int = Field(ge=1, description="Largest rank of any module; the engine needs at least this max rank.")
    size_bytes: int = Field(ge=0)


class Origin(_Part):
    """The checkpoint that went in."""

    layout: str = Field(description="Which trainer's layout was recognised: peft, ms-swift, …")
    training: Literal["lora", "qlora"] = Field(description="Trained on full-precision or on 4-bit weights.")
    evidence: tuple[str, ...] = Field(description="What says so, in words.")
    digest: Sha256 = Field(description="digest() of the checkpoint's adapter files.")


class Route(_Part):
    """The way that was taken."""

    name: RouteName
    requested: Literal["auto"] | RouteName
    merged_onto: Literal["original", "dequantized"] | None = Field(
        description="Which weights the adapter's delta was added to; null where nothing was merged."
    )
    reason: str = Field(description="Why this way, in a sentence.")


class Base(_Part):
    """The base model that went in."""

    source: str = Field(description="As the checkpoint or the user names it; never a local path.")
    revision: str | None = Field(description="The revision the checkpoint names, where it names one.")
    files: FileDigests = Field(description="Its weights and configuration with their SHA-256.")


class Retention(_Part):
    """Share of the delta that survives in the written weights: the change, projected on the delta."""

    mean: float
    least: float
    least_module: str


class Canaries(_Part):
    """Questions whose answers must hold what the fine-tune taught."""

    asked: int = Field(ge=1)
    passed: int = Field(ge=0)


class Quality(_Part):
    """What the result lost against the function as trained, measured on held-out text."""

    reference: str = Field(description="What the result was compared with.")
    text: str = Field(description="Name of the text, or `default`.")
    tokens: int = Field(ge=1, description="Token positions compared.")
    kl_mean: float = Field(ge=0, description="Mean KL(reference || result) in nats per token.")
    kl_p99: float = Field(ge=0)
    top1_agreement: float = Field(ge=0, le=1, description="Share of positions with the same best token.")
    perplexity: float | None = Field(default=None, description="Of the result on the text.")
    perplexity_reference: float | None = Field(default=None, description="Of the function as trained.")
    perplexity_base: float | None = Field(default=None, description="Of the base without the adapter.")
    gain_kept: float | None = Field(
        default=None,
        description="Share of the fine-tune's gain in mean log-probability that the result keeps; null where the "
        "fine-tune gains nothing on this text.",
    )
    retention: Retention | None = None
    canaries: Canaries | None = None


class Trial(_Part):
    """One form that was made and measured while choosing."""

    route: RouteName
    quantization: QuantizationName
    size_bytes: int = Field(ge=0)
    quality: Quality | None
    verdict: str = Field(description="Taken, or why not, in a sentence.")


class Recovery(_Part):
    """What distilling a QLoRA adapter back onto the full-precision weights reached, in mean KL on held-out text."""

    rank: int = Field(ge=1)
    steps: int = Field(ge=0)
    kl_naive: float = Field(ge=0, description="The adapter on the full-precision weights as it is.")
    kl_start: float = Field(ge=0, description="With the low-rank fit of the quantization error.")
    kl_recovered: float = Field(ge=0, description="After the last step.")


class Manifest(_Part):
    """Everything that is known of an artifact. No clock in it: the same input gives the same bytes."""

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
    golden: Sha256 | None = Field(default=None, description="SHA-256 of golden.json, where there is one.")
    versions: dict[str, str] = Field(description="Versions of the libraries that made it.")


class GoldenPrompt(_Part):
    """Tokens and what the model says of each one given those before it."""

    token_ids: tuple[int, ...] = Field(min_length=2)
    reference: tuple[float, ...] = Field(
        description="Log-probability of every token but the first under the function as trained."
    )
    result: tuple[float, ...] = Field(description="The same under the written files, in float32.")
    base: tuple[float, ...] | None = Field(
        default=None, description="The same under the base alone; only where the adapter stays separate."
    )


class GoldenChat(_Part):
    """A conversation and the text its chat template makes of it."""

    messages: tuple[dict[str, str], ...]
    rendered: str


class GoldenCanary(_Part):
    """A question, and what the answer must hold, in any case."""

    messages: tuple[dict[str, str], ...]
    expect: str


class Golden(_Part):
    """golden.json: what a server of the artifact is compared with."""

    prompts: tuple[GoldenPrompt, ...]
    chats: tuple[GoldenChat, ...]
    canaries: tuple[GoldenCanary, ...]
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Artifact:
    """An artifact on disk whose manifest has been read and found well-formed."""

    root: Path
    manifest: Manifest

    @classmethod
    def open(cls, root: Path) -> Artifact:
        """Read the manifest; file contents are checked by `verify`. Raises ArtifactInvalid."""
        path = root / MANIFEST
        if not path.is_file():
            raise ArtifactInvalid(
                f"{root} is not an artifact: it has no {MANIFEST}. "
                "Make one with: python -m convert run CHECKPOINT --base BASE --out DIR"
            )
        try:
            manifest = Manifest.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise ArtifactInvalid(f"{path} does not follow {SCHEMA}: {problems_of(error)}") from error
        return cls(root, manifest)

    @property
    def model_path(self) -> Path | None:
        return self.root / MODEL_DIR if self.manifest.model.path else None

    @property
    def adapter_path(self) -> Path | None:
        return self.root / ADAPTER_DIR if self.manifest.adapter else None

    def verify(self) -> None:
        """Hash every file and compare with the manifest. Raises ArtifactInvalid naming all that differ."""
        problems: list[str] = []
        if self.model_path:
            problems += _differences(self.model_path, self.manifest.model.files)
        if self.adapter_path and self.manifest.adapter:
            problems += _differences(self.adapter_path, self.manifest.adapter.files)
        problems += self._identity_problems()
        if problems:
            raise ArtifactInvalid(
                f"{self.root} is not what its manifest says: {'; '.join(problems)}. "
                "Convert it again, or copy it again from where it was whole."
            )

    def _identity_problems(self) -> list[str]:
        manifest = self.manifest
        problems = []
        if digest(manifest.model.files) != manifest.model.fingerprint:
            problems.append("the model's fingerprint is not the digest of its files")
        if manifest.adapter and digest(manifest.adapter.files) != manifest.adapter.revision:
            problems.append("the adapter's revision is not the digest of its files")
        return problems


def problems_of(error: ValidationError) -> str:
    """Every field that was wrong and why, on one line."""
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())


def digest(files: Mapping[str, str]) -> str:
    """One SHA-256 for a set of files: of the lines `<sha256>  <path>\\n` in path order, as sha256sum prints them."""
    lines = "".join(f"{files[path]}  {path}\n" for path in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def file_digests(root: Path) -> dict[str, str]:
    """SHA-256 of every file below `root`, by path relative to it."""
    return {path.relative_to(root).as_posix(): file_sha256(path) for path in sorted(root.rglob("*")) if path.is_file()}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    sha = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(_READ_BYTES):
            sha.update(piece)
    return sha.hexdigest()


def size_bytes(root: Path) -> int:
    """Bytes of all files below `root`."""
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def _differences(root: Path, expected: Mapping[str, str]) -> list[str]:
    if not root.is_dir():
        return [f"{root.name}/ is missing"]
    found = file_digests(root)
    return (
        [f"{root.name}/{path} is missing" for path in sorted(expected.keys() - found.keys())]
        + [f"{root.name}/{path} is not in the manifest" for path in sorted(found.keys() - expected.keys())]
        + [
            f"{root.name}/{path} has other bytes"
            for path in sorted(found.keys() & expected.keys())
            if found[path] != expected[path]
        ]
    )
