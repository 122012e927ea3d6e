"""What an adapter must be before an engine sees it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from convert.signature import is_signed, public_key
from serve.adapter_files import largest_rank, linear_shapes, problems
from serve.candidate import Candidate
from serve.config import AdmissionSettings, EngineSettings
from serve.errors import AdapterRejected

_SHOWN = 5


class Admission:
    """The checks of one server: what it is for, and what its base model is made of."""

    def __init__(self, engine: EngineSettings, settings: AdmissionSettings) -> None:
        """Raises SigningKeyInvalid."""
        self._engine = engine
        self._settings = settings
        self._trusted = [public_key(path) for path in settings.trusted_keys]

    def check(self, candidate: Candidate, directory: Path) -> None:
        """Raises AdapterRejected with every reason why the files in `directory` can't be served as `candidate`."""
        if found := objections(candidate, self._engine):
            raise AdapterRejected(f"{candidate.adapter} can't be served here: {'; '.join(found)}.")
        if self._trusted and not is_signed(candidate.signature, candidate.statement, self._trusted):
            raise AdapterRejected(
                f"{candidate.adapter} is not signed by a key that this server trusts: `python -m convert sign` it with "
                "one of them, and publish it again."
            )
        size = sum(it.stat().st_size for it in directory.iterdir())
        if size > self._settings.max_adapter_bytes:
            raise AdapterRejected(
                f"{candidate.adapter} has {size} bytes, more than this server's {self._settings.max_adapter_bytes} "
                "(max_adapter_bytes)."
            )
        if (rank := largest_rank(directory)) > candidate.rank:
            raise AdapterRejected(f"{candidate.adapter} has rank {rank}, not {candidate.rank} as it was announced.")
        if found := problems(directory, self._modules):
            more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            raise AdapterRejected(f"{candidate.adapter} can't be served: {'; '.join(found[:_SHOWN])}{more}.")

    @cached_property
    def _modules(self) -> Mapping[str, tuple[int, int] | None]:
        return linear_shapes(self._engine.model_path)


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
