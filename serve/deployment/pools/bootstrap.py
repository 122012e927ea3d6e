"""Puts the artifacts that a server is started with into its catalogue and store, before any replica runs."""

from __future__ import annotations

from collections.abc import Sequence

from serve.adapters.admission import Admission, incompatibilities
from serve.adapters.ingest import ingest_artifact
from serve.catalogue.entry import Audit, user_name
from serve.catalogue.pool_changes import pools_of
from serve.catalogue.state_dir import StateDir
from serve.deployment.pools.bundle import Bundle
from serve.errors import AdapterRejected, ArtifactRefused, StateInvalid, TransitionRefused
from serve.settings import ServeSettings


def register(bundles: Sequence[Bundle], settings: ServeSettings, state: StateDir) -> None:
    """Publish the adapters of the bundles. `settings`: of any pool. Raises StateInvalid if this server can't serve an
    adapter of the catalogue, ArtifactRefused if it can't serve one of the bundles."""
    log, store = state.log, state.store
    catalogue = log.read()
    engines = [pool.engine for pool in pools_of(settings, catalogue)]
    admission = Admission(lambda: engines, settings.admission)
    for candidate in catalogue.wanted:
        if problems := incompatibilities(candidate, engines):
            raise StateInvalid(
                f"{state.place} holds {candidate.adapter}: {'; '.join(problems)}; or use another --state."
            )
    audit = Audit(user_name(), "given to `run`")
    for candidate, artifact in (adapter for bundle in bundles for adapter in bundle.adapters):
        if problems := incompatibilities(candidate, engines):
            raise ArtifactRefused(f"{artifact.root}: {'; '.join(problems)}.")
        ingest_artifact(artifact, candidate.name, store)
        try:
            with store.held(candidate.adapter) as files:
                admission.check(candidate, files)
            # A revision that served before is not promoted again: its alias may point to another revision by now.
            if not catalogue.was_promoted(candidate.adapter):
                log.stage(candidate, audit)
                log.promote(candidate, audit)
        except (AdapterRejected, TransitionRefused) as error:
            raise ArtifactRefused(f"{artifact.root}: {error}") from error
