"""Checks that an adapter must pass before it reaches an engine: base model, name, rank, signature, size and files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from convert.artifact.signature import is_signed, public_key
from serve.adapters.file_validation import adapter_problems, largest_rank, linear_shapes
from serve.catalogue.candidate import Candidate
from serve.errors import AdapterRejected
from serve.settings import AdmissionSettings, EngineSettings

_SHOWN_PROBLEMS = 5


class Admission:
    """The admission checks of one server, for its base model and its settings."""

    def __init__(self, engine: EngineSettings, settings: AdmissionSettings) -> None:
        """Raises SigningKeyInvalid."""
        self._engine = engine
        self._settings = settings
        self._trusted_keys = [public_key(path) for path in settings.trusted_keys]

    def check(self, candidate: Candidate, directory: Path) -> None:
        """Raises AdapterRejected, with the reason, if the files in `directory` can't be served as `candidate`."""
        if reasons := incompatibilities(candidate, self._engine):
            raise AdapterRejected(f"{candidate.adapter} can't be served here: {'; '.join(reasons)}.")
        self._check_signature(candidate)
        self._check_size(candidate, directory)
        if (rank := largest_rank(directory)) > candidate.rank:
            raise AdapterRejected(f"{candidate.adapter} has rank {rank}, not {candidate.rank} as it was announced.")
        self._check_files(candidate, directory)

    def _check_signature(self, candidate: Candidate) -> None:
        if self._trusted_keys and not is_signed(candidate.signature, candidate.statement, self._trusted_keys):
            raise AdapterRejected(
                f"{candidate.adapter} is not signed by a key that this server trusts: `python -m convert sign` it with "
                "one of them, and publish it again."
            )

    def _check_size(self, candidate: Candidate, directory: Path) -> None:
        size = sum(path.stat().st_size for path in directory.iterdir())
        if size > self._settings.max_adapter_bytes:
            raise AdapterRejected(
                f"{candidate.adapter} has {size} bytes, more than this server's {self._settings.max_adapter_bytes} "
                "(max_adapter_bytes)."
            )

    def _check_files(self, candidate: Candidate, directory: Path) -> None:
        if problems := adapter_problems(directory, self._base_shapes):
            hidden = len(problems) - _SHOWN_PROBLEMS
            more = f"; and {hidden} more" if hidden > 0 else ""
            raise AdapterRejected(
                f"{candidate.adapter} can't be served: {'; '.join(problems[:_SHOWN_PROBLEMS])}{more}."
            )

    @cached_property
    def _base_shapes(self) -> Mapping[str, tuple[int, int] | None]:
        return linear_shapes(self._engine.model_path)


def incompatibilities(candidate: Candidate, engine: EngineSettings) -> list[str]:
    """The reasons why this engine can't serve the adapter, each with a remedy; empty if it can."""
    reasons = []
    if candidate.base != engine.fingerprint:
        reasons.append(
            f"it was made for the base model {candidate.base[:12]}, but {engine.model_name} here is "
            f"{engine.fingerprint[:12]}; convert it for this base"
        )
    if candidate.name == engine.model_name:
        reasons.append(f"its name is the name of the base model, {engine.model_name}; give it another with --name")
    if engine.max_lora_rank == 0:
        reasons.append("this server runs without adapters; start one with the artifact of an adapter")
    elif candidate.rank > engine.max_lora_rank:
        reasons.append(
            f"its rank {candidate.rank} is above this server's {engine.max_lora_rank}; "
            f"start the server with --max-lora-rank {candidate.rank} or more"
        )
    return reasons
