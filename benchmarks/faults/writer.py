"""`python -m benchmarks.faults.writer STATE LOCAL ARTIFACT`: stage and promote, as another machine's replica does."""

from __future__ import annotations

import sys
from pathlib import Path

from convert.artifact import Artifact
from serve.intake import take_artifact
from serve.state import StateDir


def main(place: str, local: str, artifact: str) -> None:
    state = StateDir(place, Path(local) / "writer")
    candidate = take_artifact(Artifact.open(Path(artifact)), "swiss", state.store)
    state.log.stage(candidate)
    state.log.promote(candidate)


if __name__ == "__main__":
    main(*sys.argv[1:])
