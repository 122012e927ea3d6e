"""Puts the artifacts that a server is started with into its catalogue and store, before any replica runs."""

from __future__ import annotations

from collections.abc import Iterable

from serve.adapters.admission import Admission, incompatibilities
from serve.adapters.bundle import Bundle
from serve.adapters.ingest import ingest_artifact
from serve.catalogue.candidate import Candidate
from serve.catalogue.entry import Audit, user_name
from serve.catalogue.state_dir import StateDir
from serve.errors import AdapterRejected, ArtifactRefused, StateInvalid
from serve.settings import ServeSettings, supported_rank


def register(bundle: Bundle, settings: ServeSettings, state: StateDir) -> None:
    """Publish the bundle's adapters. Raises StateInvalid if this server can't serve an adapter of the catalogue,
    ArtifactRefused if it can't serve one of the bundle."""
    log, store = state.log, state.store
    admission = Admission(settings.engine, settings.admission)
    catalogue = log.read()
    for candidate in catalogue.wanted:
        if problems := incompatibilities(candidate, settings.engine):
            raise StateInvalid(
                f"{state.place} holds {candidate.adapter}: {'; '.join(problems)}; or use another --state."
            )
    audit = Audit(user_name(), "given to `run`")
    for candidate, artifact in bundle.adapters:
        if problems := incompatibilities(candidate, settings.engine):
            raise ArtifactRefused(f"{artifact.root}: {'; '.join(problems)}.")
        ingest_artifact(artifact, candidate.name, store)
        try:
            with store.held(candidate.adapter) as files:
                admission.check(candidate, files)
        except AdapterRejected as error:
            raise ArtifactRefused(f"{artifact.root}: {error}") from error
        # A revision that served before is not promoted again: its alias may point to another revision by now.
        if not catalogue.was_promoted(candidate.adapter):
            log.stage(candidate, audit)
            log.promote(candidate, audit)


def needed_rank(requested: int | None, ranks: Iterable[int], wanted: Iterable[Candidate]) -> int:
    """The largest rank of adapters that the engine must hold: the one that was requested, else the largest of `ranks`
    and of the catalogue's adapters. Rounded up to a rank that vLLM supports; 0: no adapters."""
    if requested is not None:
        return supported_rank(requested) if requested else 0
    all_ranks = (*ranks, *(candidate.rank for candidate in wanted))
    return max((supported_rank(rank) for rank in all_ranks if rank), default=0)
