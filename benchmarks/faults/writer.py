"""`python -m benchmarks.faults.writer STATE LOCAL ARTIFACT` stages and promotes, as a replica elsewhere does."""

from __future__ import annotations

import sys
from pathlib import Path

from convert.artifact import Artifact
from serve.adapters.ingest import ingest_artifact
from serve.catalogue.state_dir import StateDir


def main(state_url: str, local: str, artifact: str) -> None:
    state = StateDir(state_url, Path(local) / "writer")
    candidate = ingest_artifact(Artifact.open(Path(artifact)), "swiss", state.store)
    state.log.stage(candidate)
    state.log.promote(candidate)


if __name__ == "__main__":
    main(*sys.argv[1:])
