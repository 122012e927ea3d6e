"""An adapter revision with what decides whether an engine can take it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from convert.artifact import Manifest, Name, Sha256
from serve.names import AdapterRevision


class Candidate(BaseModel):
    """Travels from the artifact through the admin API into the catalogue."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    revision: Sha256
    base: Sha256 = Field(description="Fingerprint of the base model it was made for.")
    rank: int = Field(ge=1)

    @classmethod
    def of(cls, manifest: Manifest, name: str | None = None) -> Candidate | None:
        """The adapter of an artifact under its own or another name; None for a merged model."""
        if manifest.adapter is None:
            return None
        return cls(
            name=name or manifest.name,
            revision=manifest.adapter.revision,
            base=manifest.model.fingerprint,
            rank=manifest.adapter.rank,
        )

    @property
    def adapter(self) -> AdapterRevision:
        return AdapterRevision(self.name, self.revision)
