"""The names of a model: for clients, in the catalogue, and inside the engine."""

from __future__ import annotations

from dataclasses import dataclass

# Separates a name from a revision. Names can't contain it (convert.artifact.Name), so no text can be read in two ways.
# It is not `:`, which fine-tune ids of other APIs contain, and not `/`, which hub ids contain.
SEPARATOR = "@"
SHORT_REVISION = 12  # hex digits, 48 bits: enough, because only revisions of the same name could clash


@dataclass(frozen=True, order=True, slots=True)
class AdapterRevision:
    """One immutable adapter: its stable public name and the digest of its bytes."""

    name: str
    revision: str

    @property
    def engine_name(self) -> str:
        """The name of the adapter in the engine. It contains the digest, because the engine keys its prefix cache by
        name: two different weights must never have the same name."""
        return f"{self.name}{SEPARATOR}{self.revision[:SHORT_REVISION]}"

    def __str__(self) -> str:
        return self.engine_name


@dataclass(frozen=True)
class RequestedModel:
    """What a client wrote as `model`: an alias, or an alias pinned to one revision."""

    name: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> RequestedModel:
        """Parses `pirate` or `pirate@0123456789ab`. Any other text becomes a name that no model has."""
        name, separator, revision = text.partition(SEPARATOR)
        return cls(name, revision) if separator else cls(text)
