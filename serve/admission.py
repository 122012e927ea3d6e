"""What an adapter must be before an engine sees it."""

from __future__ import annotations

from serve.candidate import Candidate
from serve.config import EngineSettings


def objections(candidate: Candidate, engine: EngineSettings) -> list[str]:
    """Why this engine can't serve the adapter, each with what to do; empty if it can."""
    found = []
    if candidate.base != engine.fingerprint:
        found.append(
            f"it was made for the base model {candidate.base[:12]}, but {engine.model_name} here is "
            f"{engine.fingerprint[:12]}; convert it for this base"
        )
    if candidate.name == engine.model_name:
        found.append(f"its name is the name of the base model, {engine.model_name}; give it another with --name")
    if engine.max_lora_rank == 0:
        found.append("this server runs without adapters; start one with the artifact of an adapter")
    elif candidate.rank > engine.max_lora_rank:
        found.append(
            f"its rank {candidate.rank} is above this server's {engine.max_lora_rank}; "
            f"start the server with --max-lora-rank {candidate.rank} or more"
        )
    return found
