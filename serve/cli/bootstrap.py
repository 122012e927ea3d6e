"""Puts the artifacts that a server is started with into its catalogue and store, before any replica runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from serve.adapters.admission import Admission, incompatibilities
from serve.adapters.ingest import ingest_artifact
from serve.catalogue.candidate import Candidate
from serve.catalogue.entry import Audit, user_name
from serve.catalogue.state_dir import StateDir
from serve.deployment.bundle import Bundle
from serve.errors import AdapterRejected, ArtifactRefused, MemoryShort, StateInvalid, TransitionRefused
from serve.observability.memory import gib
from serve.settings import ServeSettings, supported_rank


def check_memory(bundles: Sequence[Bundle], replicas: int, available_bytes: int) -> None:
    """Raises MemoryShort if the weights alone of all engines on the CPU take more memory than there is: the kernel
    would end an engine while it starts. `replicas`: engines for each bundle."""
    needed = {bundle.model_name: replicas * bundle.weight_bytes for bundle in bundles}
    if (total := sum(needed.values())) > available_bytes:
        each = ", ".join(f"{gib(count)} for {name}" for name, count in needed.items())
        raise MemoryShort(
            f"The weights of all engines need {gib(total)} GiB ({each}), and {gib(available_bytes)} GiB of memory are "
            "available. Serve fewer models or replicas, or convert with another --quantize."
        )


def register(bundles: Sequence[Bundle], settings: ServeSettings, state: StateDir) -> None:
    """Publish the adapters of the bundles. `settings`: of any pool. Raises StateInvalid if this server can't serve an
    adapter of the catalogue, ArtifactRefused if it can't serve one of the bundles."""
    log, store = state.log, state.store
    engines = settings.base_models
    admission = Admission(engines, settings.admission)
    catalogue = log.read()
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


def needed_rank(requested: int | None, ranks: Iterable[int], wanted: Iterable[Candidate]) -> int:
    """The largest rank of adapters that the engine must hold: the one that was requested, else the largest of `ranks`
    and of the catalogue's adapters. Rounded up to a rank that vLLM supports; 0: no adapters."""
    if requested is not None:
        return supported_rank(requested) if requested else 0
    all_ranks = (*ranks, *(candidate.rank for candidate in wanted))
    return max((supported_rank(rank) for rank in all_ranks if rank), default=0)
