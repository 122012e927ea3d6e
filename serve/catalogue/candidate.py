"""An adapter revision that may be published: what an engine must know to take it, and where it came from."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, ClassVar

import pydantic
from pydantic import AfterValidator, ConfigDict, Field

from convert.artifact import Manifest, Name, Sha256
from convert.artifact.signature import MAX_CHARACTERS, statement
from serve.names import AdapterRevision

# Interned: thousands of adapters have the same base model.
_Base = Annotated[Sha256, AfterValidator(sys.intern)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """How a revision was trained and converted, by its manifest; kept in the history. It is no pydantic model, which
    would take more memory: see `serve.catalogue.adapter_state`."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    source: str  # the base model as the checkpoint or the user names it
    layout: str  # of the checkpoint: the trainer's
    origin: Sha256 | None = None  # digest() of the checkpoint's adapter files
    training: str | None = None  # lora or qlora; None: unknown
    route: str | None = None  # of the conversion; None: not converted
    kl_mean: float | None = None  # measured loss, nats per token
    top1_agreement: float | None = None


@pydantic.dataclasses.dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Candidate:
    """Travels from the artifact through the admin API into the catalogue. pydantic validates every instance."""

    name: Name
    revision: Sha256
    base: _Base = Field(description="Fingerprint of the base model it was made for.")
    rank: int = Field(ge=1)
    golden: Sha256 | None = Field(default=None, description="SHA-256 of its golden.json, where it has one.")
    lineage: Lineage | None = None
    signature: str | None = Field(
        default=None, max_length=MAX_CHARACTERS, description="convert.artifact.signature, in Base64."
    )

    @classmethod
    def of(cls, manifest: Manifest, name: str | None = None, signature: str | None = None) -> Candidate | None:
        """The adapter of an artifact as a candidate, under its own or another name; None for a merged model."""
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
        """The bytes that its signature signs."""
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
