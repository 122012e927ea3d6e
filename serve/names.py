"""What a model is called: by clients, in the catalogue, and inside the engine."""

from __future__ import annotations

from dataclasses import dataclass

# Between a name and a revision. Names can't contain it (convert.artifact.Name), so a split is exact;
# `:` was left alone because fine-tune ids of other APIs use it, `/` because hub ids do.
SEPARATOR = "@"
SHORT_REVISION = 12  # hex digits: 48 bits, and a clash of two revisions of ONE name is all that could matter


@dataclass(frozen=True, order=True, slots=True)
class AdapterRevision:
    """One immutable adapter: its stable public name and the digest of its bytes."""

    name: str
    revision: str

    @property
    def engine_name(self) -> str:
        """The name the engine knows it by. The engine keys its prefix cache by name, so no two different
        weights may ever share one: that is why the digest is part of it."""
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
        """`pirate` or `pirate@0123456789ab`. Anything else stays a name that nobody has."""
        name, separator, revision = text.partition(SEPARATOR)
        return cls(name, revision) if separator else cls(text)
