"""An adapter revision with what decides whether an engine can take it, and where it came from."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, ClassVar

import pydantic
from pydantic import AfterValidator, ConfigDict, Field

from convert.artifact import Manifest, Name, Sha256
from convert.signature import MAX_CHARACTERS, statement
from serve.names import AdapterRevision

# Thousands of adapters have the same one.
_Base = Annotated[Sha256, AfterValidator(sys.intern)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """What the manifest tells of a revision's making; kept in history. No model of pydantic's: see serve.catalogue."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    source: str  # the base model as the checkpoint or the user names it
    layout: str  # the trainer's layout it came in
    origin: Sha256 | None = None  # digest() of the checkpoint's adapter files
    training: str | None = None  # lora or qlora; None: unknown
    route: str | None = None  # how it was converted; None: it was not
    kl_mean: float | None = None  # measured loss, nats per token
    top1_agreement: float | None = None


@pydantic.dataclasses.dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Candidate:
    """Travels from the artifact through the admin API into the catalogue. Checked whenever it is made."""

    name: Name
    revision: Sha256
    base: _Base = Field(description="Fingerprint of the base model it was made for.")
    rank: int = Field(ge=1)
    golden: Sha256 | None = Field(default=None, description="SHA-256 of its golden.json, where it has one.")
    lineage: Lineage | None = None
    signature: str | None = Field(default=None, max_length=MAX_CHARACTERS, description="convert.signature, in Base64.")

    @classmethod
    def of(cls, manifest: Manifest, name: str | None = None, signature: str | None = None) -> Candidate | None:
        """The adapter of an artifact under its own or another name; None for a merged model."""
        if manifest.adapter is None:
            return None
        return cls(
            name=name or manifest.name,
            revision=manifest.adapter.revision,
            base=manifest.model.fingerprint,
            rank=manifest.adapter.rank,
            golden=manifest.golden,
            lineage=_lineage(manifest),
            signature=signature,
        )

    @property
    def adapter(self) -> AdapterRevision:
        return AdapterRevision(self.name, self.revision)

    @property
    def statement(self) -> bytes:
        """What a signature of it signs."""
        return statement(self.revision, self.base, self.golden)


def _lineage(manifest: Manifest) -> Lineage:
    quality = manifest.quality
    return Lineage(
        source=manifest.base.source if manifest.base else manifest.model.source,
        layout=manifest.origin.layout,
        origin=manifest.origin.digest,
        training=manifest.origin.training,
        route=manifest.route.name,
        kl_mean=quality.kl_mean if quality else None,
        top1_agreement=quality.top1_agreement if quality else None,
    )
