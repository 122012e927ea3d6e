"""Builds the adapters of the benchmarks: two QLoRA revisions over a tiny model, and a LoRA of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from convert.artifact import Artifact
from serve.catalogue.candidate import Candidate


@dataclass(frozen=True)
class TinyAdapters:
    """Two artifacts of one adapter name: `first` contains the 4-bit base, `second` is another revision over it."""

    name: str
    first: Path
    second: Path

    @property
    def model(self) -> Path:
        return self.first / "model"

    def candidate(self, artifact: Path, name: str) -> Candidate:
        candidate = Candidate.of(Artifact.open(artifact).manifest, name)
        assert candidate is not None
        return candidate


def build_lora_artifact(home: Path, artifact: Path, route: str) -> None:
    """An artifact of the tiny model in bfloat16 with one LoRA, separate or merged: the least work for an engine."""
    from tests.convert import parts
    from tests.e2e.conftest import convert

    home.mkdir(parents=True)
    base = parts.save_base(home / "base", tied=True, hidden=128)
    checkpoint = parts.mark_lora(parts.save_adapter(base, home / "one"))
    convert(checkpoint, base, artifact, "--name", "french", "--route", route)


def build_tiny_adapters(home: Path) -> TinyAdapters:
    """Fine-tune and convert both revisions below `home`."""
    from tests.convert import parts
    from tests.e2e.conftest import convert, fine_tune

    home.mkdir(parents=True)
    base = parts.save_base(home / "base", tied=True, hidden=128)
    adapters = TinyAdapters("french", home / "artifacts" / "first", home / "artifacts" / "second")
    convert(fine_tune(base, home / "one", 0), base, adapters.first, "--name", adapters.name)
    convert(fine_tune(base, home / "two", 1), adapters.first, adapters.second, "--name", adapters.name)
    return adapters
