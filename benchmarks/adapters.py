"""The adapters of the benchmarks: QLoRA revisions of a tiny model that are swapped, and a LoRA; made and converted
here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from convert.artifact import Artifact
from serve.candidate import Candidate


@dataclass(frozen=True)
class Tiny:
    """`first` holds the 4-bit base; `second` is another revision for it under the same name."""

    name: str
    first: Path
    second: Path

    @property
    def model(self) -> Path:
        return self.first / "model"

    def candidate(self, artifact: Path, name: str) -> Candidate:
        made = Candidate.of(Artifact.open(artifact).manifest, name)
        assert made is not None
        return made


def plain(home: Path, artifact: Path, route: str) -> None:
    """An artifact of the same tiny model in bfloat16 and one LoRA, beside it or merged: least work for an engine."""
    from tests.convert import parts
    from tests.e2e.conftest import convert

    home.mkdir(parents=True)
    base = parts.save_base(home / "base", tied=True, hidden=128)
    checkpoint = parts.mark_lora(parts.save_adapter(base, home / "one"))
    convert(checkpoint, base, artifact, "--name", "french", "--route", route)


def tiny(home: Path) -> Tiny:
    from tests.convert import parts
    from tests.e2e.conftest import convert, fine_tune

    home.mkdir(parents=True)
    base = parts.save_base(home / "base", tied=True, hidden=128)
    made = Tiny("french", home / "artifacts" / "first", home / "artifacts" / "second")
    convert(fine_tune(base, home / "one", 0), base, made.first, "--name", made.name)
    convert(fine_tune(base, home / "two", 1), made.first, made.second, "--name", made.name)
    return made
