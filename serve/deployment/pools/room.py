"""Whether a pool's engines can start on this machine, found out before they do."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from importlib.util import find_spec

from convert.artifact import Artifact
from convert.artifact.json_files import VISION, has_setting
from convert.errors import ArtifactInvalid
from serve.catalogue.candidate import Candidate
from serve.deployment.pools.bundle import Bundle
from serve.errors import EngineRefused, MemoryShort
from serve.observability.memory import gib
from serve.settings import EngineSettings, ServeSettings, supported_rank


def weights_of(bundles: Iterable[Bundle], replicas: int) -> dict[str, int]:
    """Bytes for the engines of each model. `replicas`: engines for each bundle."""
    return {bundle.model_name: replicas * bundle.weight_bytes for bundle in bundles}


def check_memory(needed: Mapping[str, int], available_bytes: int) -> None:
    """Raises MemoryShort if the weights alone of all engines on the CPU take more memory than there is: the kernel
    would end an engine while it starts. `needed`: bytes for each model."""
    if (total := sum(needed.values())) > available_bytes:
        each = ", ".join(f"{gib(count)} for {name}" for name, count in needed.items())
        raise MemoryShort(
            f"The weights of all engines need {gib(total)} GiB ({each}), and {gib(available_bytes)} GiB of memory are "
            "available. Serve fewer models or replicas, or convert with another --quantize."
        )


def check_model(settings: ServeSettings) -> None:
    """Raises EngineRefused if there is no model for the engine, if vLLM lacks a library for it, or if in the place of
    one that was added to the running server there is another one. What `run` is given was verified by it."""
    path = settings.engine.model_path
    if not (path / "config.json").is_file():
        raise EngineRefused(f"There is no model in {path}: put its artifact back there.")
    if has_setting(path / "config.json", VISION) and find_spec("torchvision") is None:
        raise EngineRefused(
            f"{path} is a multimodal model, for which vLLM imports torchvision, and that is not installed in the "
            f"environment of {sys.executable}. Install the version that fits its torch there."
        )
    if not settings.added:
        return
    try:
        fingerprint = Artifact.open(path.parent).manifest.model.fingerprint
    except ArtifactInvalid as error:
        raise EngineRefused(str(error)) from error
    if fingerprint != settings.engine.fingerprint:
        raise EngineRefused(
            f"{path.parent} holds another model than when it was added: remove the pool, and add it again."
        )


def check_arguments(settings: EngineSettings) -> None:
    """Raises EngineRefused with vLLM's reason for arguments that it does not take."""
    from serve.engine.vllm_engine import parse_args  # imports vLLM, which a replica has done already

    parse_args(settings)


def needed_rank(requested: int | None, ranks: Iterable[int], wanted: Iterable[Candidate]) -> int:
    """The largest rank of adapters that the engine must hold: the one that was requested, else the largest of `ranks`
    and of the catalogue's adapters. Rounded up to a rank that vLLM supports; 0: no adapters."""
    if requested is not None:
        return supported_rank(requested) if requested else 0
    all_ranks = (*ranks, *(candidate.rank for candidate in wanted))
    return max((supported_rank(rank) for rank in all_ranks if rank), default=0)
