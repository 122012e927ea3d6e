"""What a server is started with, put into catalogue and store before any replica runs to be asked."""

from __future__ import annotations

import getpass
from collections.abc import Iterable

from serve.admission import Admission, objections
from serve.bundle import Bundle
from serve.candidate import Candidate
from serve.config import ServeSettings, supported_rank
from serve.entry import Cause
from serve.errors import AdapterRejected, ArtifactRefused, StateInvalid
from serve.intake import take_artifact
from serve.state import StateDir


def register(bundle: Bundle, settings: ServeSettings, state: StateDir) -> None:
    """Publish the bundle's adapters. Raises StateInvalid if the catalogue wants what this server can't hold,
    ArtifactRefused if the bundle does."""
    log, store = state.log, state.store
    admission = Admission(settings.engine, settings.admission)
    catalogue = log.read()
    for candidate in catalogue.wanted:
        if found := objections(candidate, settings.engine):
            raise StateInvalid(f"{state.place} holds {candidate.adapter}: {'; '.join(found)}; or use another --state.")
    cause = Cause(getpass.getuser(), "given to `run`")
    for candidate, artifact in bundle.adapters:
        if found := objections(candidate, settings.engine):
            raise ArtifactRefused(f"{artifact.root}: {'; '.join(found)}.")
        take_artifact(artifact, candidate.name, store)
        try:
            admission.check(candidate, store.path(candidate.adapter))
        except AdapterRejected as error:
            raise ArtifactRefused(f"{artifact.root}: {error}") from error
        # What was published before stays where the catalogue says it is, and that may be elsewhere by now.
        if not catalogue.was_promoted(candidate.adapter):
            log.stage(candidate, cause)
            log.promote(candidate, cause)


def needed_rank(asked: int | None, ranks: Iterable[int], wanted: Iterable[Candidate]) -> int:
    """The engine's rank: what was asked for, rounded up to what vLLM has; else what must be held."""
    if asked is not None:
        return supported_rank(asked) if asked else 0
    return max((supported_rank(it) for it in (*ranks, *(candidate.rank for candidate in wanted)) if it), default=0)
