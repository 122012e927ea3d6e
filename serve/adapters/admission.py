"""Checks that an adapter must pass before it reaches an engine: base model, name, rank, signature, size and files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from convert.artifact.signature import is_signed, public_key
from serve.adapters.file_validation import adapter_problems, largest_rank, linear_shapes
from serve.catalogue.candidate import Candidate
from serve.errors import AdapterRejected
from serve.settings import AdmissionSettings, EngineSettings

_SHOWN_PROBLEMS = 5


class Admission:
    """The admission checks of one server, for its base models and its settings."""

    def __init__(self, engines: Callable[[], Sequence[EngineSettings]], settings: AdmissionSettings) -> None:
        """`engines`: one for each base model that there is now. Raises SigningKeyInvalid."""
        self._engines = engines
        self._settings = settings
        self._shapes: dict[str, Mapping[str, tuple[int, int] | None]] = {}
        self._trusted_keys = [public_key(path) for path in settings.trusted_keys]

    def check(self, candidate: Candidate, directory: Path) -> None:
        """Raises AdapterRejected, with the reason, if the files in `directory` can't be served as `candidate`."""
        if reasons := incompatibilities(candidate, self._engines()):
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
        if problems := adapter_problems(directory, self._base_shapes(candidate.base)):
            hidden = len(problems) - _SHOWN_PROBLEMS
            more = f"; and {hidden} more" if hidden > 0 else ""
            raise AdapterRejected(
                f"{candidate.adapter} can't be served: {'; '.join(problems[:_SHOWN_PROBLEMS])}{more}."
            )

    def _base_shapes(self, base: str) -> Mapping[str, tuple[int, int] | None]:
        if base not in self._shapes:
            engine = next(engine for engine in self._engines() if engine.fingerprint == base)
            self._shapes[base] = linear_shapes(engine.model_path)
        return self._shapes[base]

    def is_base_model(self, name: str) -> bool:
        return any(engine.model_name == name for engine in self._engines())

    def engine_for(self, base_model: str | None) -> EngineSettings:
        """The engine of an adapter that does not say what it was made for; `base_model`: what its publisher says.
        Raises AdapterRejected if that is no base model here, or if there are several and nothing is said."""
        engines = self._engines()
        taking = [engine for engine in engines if engine.max_lora_rank] or list(engines)
        names = ", ".join(engine.model_name for engine in taking)
        if base_model is None:
            if len(taking) > 1:
                raise AdapterRejected(
                    f"The adapter does not say which base model it was made for, and there are several here: {names}. "
                    "Say it in `base`, or convert the adapter."
                )
            return taking[0]
        if engine := next((engine for engine in taking if engine.model_name == base_model), None):
            return engine
        raise AdapterRejected(f"{base_model} is no base model that takes adapters here. There is: {names}.")


def incompatibilities(candidate: Candidate, engines: Sequence[EngineSettings]) -> list[str]:
    """The reasons why none of these engines can serve the adapter, each with a remedy; empty if one can."""
    of_its_base = [engine for engine in engines if engine.fingerprint == candidate.base]
    reasons = [] if of_its_base else [_other_base(candidate, engines)]
    if any(candidate.name == engine.model_name for engine in engines):
        reasons.append(f"its name is the name of the base model, {candidate.name}; give it another with --name")
    engine = (of_its_base or engines)[0]
    if engine.max_lora_rank == 0:
        reasons.append(
            f"{engine.model_name} runs without adapters; serve it with --max-lora-rank {candidate.rank} or more"
        )
    elif candidate.rank > engine.max_lora_rank:
        reasons.append(
            f"its rank {candidate.rank} is above this server's {engine.max_lora_rank}; "
            f"start the server with --max-lora-rank {candidate.rank} or more"
        )
    return reasons


def _other_base(candidate: Candidate, engines: Sequence[EngineSettings]) -> str:
    here = " and ".join(f"{engine.model_name} here is {engine.fingerprint[:12]}" for engine in engines)
    remedy = (
        "convert it for this base, or serve its base model as well: give the artifact that holds it to `run`, or while "
        "the server runs to `python -m serve pool add`"
    )
    return f"it was made for the base model {candidate.base[:12]}, but {here}; {remedy}"
