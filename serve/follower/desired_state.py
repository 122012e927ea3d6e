"""`adapters.yaml`: the adapters and pools that a server should have, and the steps that lead there from what it has.

pools:                              # default: none besides those that `run` was given
  - artifact: artifacts/zephyr      # holds its model; relative to this file
    name: zephyr                    # default: the artifact's own name
    replicas: 2                     # default: 1
    max_lora_rank: 32               # default: what the adapters below and the published ones need
    max_active_adapters: 8          # default: that of the server, as for max_resident_adapters
    sleep_after_s: 900              # without a request its engines are stopped, and started by the next; default: never
    vllm_args: [--max-model-len=4096]   # after those of the server, which they override; default: none
remove_other_pools: false           # true: remove every added pool that is not listed here
adapters:
  - artifact: artifacts/pirate      # relative to this file
    name: pirate                    # default: the artifact's own name
    pinned: true                    # default: false
retire_others: false                # true: retire every adapter that is not listed here
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from convert.artifact import MANIFEST, VLLM_LORA_RANKS, Artifact, Name, problems_of
from convert.errors import ArtifactInvalid, ConvertError
from serve.adapters.ingest import candidate_of
from serve.errors import ArtifactRefused, DesiredStateInvalid, ServeError
from serve.follower.admin_client import AdminClient
from serve.names import AdapterRevision
from serve.settings import NO_POOL_OPTIONS, PoolOptions, supported_rank
from serve.settings.unique_yaml import load_yaml

StepVerb = Literal["add pool", "publish", "pin", "unpin", "retire", "remove pool"]


class _FileModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _AdapterEntry(_FileModel):
    artifact: Path
    name: Name | None = None
    pinned: bool = False


class _PoolEntry(PoolOptions):
    artifact: Path
    name: Name | None = None
    replicas: int = Field(1, ge=1)
    max_lora_rank: int | None = Field(None, ge=0, le=VLLM_LORA_RANKS[-1])


class _AdaptersFile(_FileModel):
    adapters: tuple[_AdapterEntry, ...]
    retire_others: bool = False
    pools: tuple[_PoolEntry, ...] = ()
    remove_other_pools: bool = False


@dataclass(frozen=True)
class DesiredAdapter:
    """One adapter that the server should have."""

    adapter: AdapterRevision
    base: str  # the fingerprint of its base model
    rank: int
    pinned: bool
    artifact: Path


@dataclass(frozen=True)
class DesiredPool:
    """One base model or merged model that the server should serve."""

    base: str  # the fingerprint of the model
    artifact: Path
    name: str | None
    replicas: int
    max_lora_rank: int | None
    options: PoolOptions = NO_POOL_OPTIONS

    @property
    def shown_name(self) -> str:
        return self.name or self.artifact.name


@dataclass(frozen=True)
class DesiredState:
    """The content of the file, with the revision that each artifact has now."""

    path: Path
    adapters: tuple[DesiredAdapter, ...]
    retire_others: bool
    pools: tuple[DesiredPool, ...] = ()
    remove_other_pools: bool = False

    @classmethod
    def read(cls, path: Path) -> DesiredState:
        """Raises DesiredStateInvalid if the file, or an artifact that it names, can't be used."""
        file = _read_file(path)
        adapters = tuple(_resolve(path, entry) for entry in file.adapters)
        names = [desired.adapter.name for desired in adapters]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise DesiredStateInvalid(f"{path} names {', '.join(repeated)} more than once.")
        pools = tuple(_resolve_pool(path, entry) for entry in file.pools)
        bases = [pool.base for pool in pools]
        if repeated := sorted({pool.shown_name for pool in pools if bases.count(pool.base) > 1}):
            raise DesiredStateInvalid(f"{path} names one model in several pools: {', '.join(repeated)}.")
        return cls(path, adapters, file.retire_others, pools, file.remove_other_pools)

    @property
    def digest(self) -> str:
        """SHA-256 of the desired state: equal for two files with the same meaning."""
        lines = [
            f"{desired.adapter.name} {desired.adapter.revision} {desired.pinned}"
            for desired in sorted(self.adapters, key=lambda desired: desired.adapter)
        ]
        pools = [
            f"pool {pool.base} {pool.name} {pool.replicas} {pool.max_lora_rank} {pool.options.model_dump_json()}"
            for pool in sorted(self.pools, key=lambda pool: pool.base)
        ]
        others = [str(self.retire_others), *(["remove other pools"] if self.remove_other_pools else [])]
        return hashlib.sha256("\n".join([*lines, *others, *pools]).encode()).hexdigest()


@dataclass(frozen=True)
class Step:
    """One call of the admin API."""

    verb: StepVerb
    name: str
    revision: str | None = None  # the digest, or its first digits
    artifact: Path | None = None
    pool: DesiredPool | None = None

    def waits_for(self, other: Step) -> bool:
        """Whether it is not taken after the other one has failed."""
        is_of_pool = other.verb in ("add pool", "remove pool")
        return self.verb == "remove pool" if is_of_pool else self.name == other.name

    def __str__(self) -> str:
        return f"{self.verb} {self.name}" + (f"@{self.revision[:12]}" if self.revision else "")


def manifests_named_in(path: Path) -> list[Path]:
    """The files besides `path` that decide the desired state, whether they are there or not; none if `path` itself
    can't be used."""
    try:
        file = _read_file(path)
        entries: list[_AdapterEntry | _PoolEntry] = [*file.pools, *file.adapters]
        return [_root_of(path, entry) / MANIFEST for entry in entries]
    except DesiredStateInvalid:
        return []


def steps_to(desired: DesiredState, client: AdminClient) -> tuple[Step, ...]:
    """The steps from what the server has to the desired state; none if they are equal. Pools are added first, and
    removed last. Raises as the client does."""
    pools = client.pools() if desired.pools or desired.remove_other_pools else ()
    return (*_pools_to_add(desired, pools), *diff(desired, client.adapters()), *_pools_to_remove(desired, pools))


def _pools_to_add(desired: DesiredState, actual: Sequence[Mapping[str, Any]]) -> Iterator[Step]:
    """A pool that is there but not as desired is a step, too: the server says what to do. One that does not run yet is
    waited for."""
    by_base = {listed["base"]: listed for listed in actual}
    for wanted in desired.pools:
        if not _is_as_desired(wanted, by_base.get(wanted.base)):
            ranks = [adapter.rank for adapter in desired.adapters if adapter.base == wanted.base]
            rank = max(map(supported_rank, ranks)) if wanted.max_lora_rank is None and ranks else wanted.max_lora_rank
            yield Step("add pool", wanted.shown_name, pool=replace(wanted, max_lora_rank=rank))


def _is_as_desired(wanted: DesiredPool, listed: Mapping[str, Any] | None) -> bool:
    return (
        listed is not None
        and listed["state"] in ("running", "asleep")
        and listed["replicas"] == wanted.replicas
        and wanted.name in (None, listed["name"])
        and wanted.max_lora_rank in (None, listed["max_lora_rank"])
        and wanted.options.max_active_adapters in (None, listed["max_active_adapters"])
        and wanted.options.max_resident_adapters in (None, listed["max_resident_adapters"])
        and wanted.options.sleep_after_s == listed["sleep_after_s"]
        and list(wanted.options.vllm_args) == listed["vllm_args"]
    )


def _pools_to_remove(desired: DesiredState, actual: Sequence[Mapping[str, Any]]) -> Iterator[Step]:
    bases = {wanted.base for wanted in desired.pools}
    if desired.remove_other_pools:
        yield from (Step("remove pool", pool["name"]) for pool in actual if pool["added"] and pool["base"] not in bases)


def diff(desired: DesiredState, actual: Sequence[Mapping[str, Any]]) -> tuple[Step, ...]:
    """The steps from `actual`, the adapters that the admin API lists, to the desired adapters; none if they are equal.
    New adapters are published before others are retired."""
    actual_by_name = {listed["name"]: listed for listed in actual}
    publish, pin, unpin = [], [], []
    for wanted in desired.adapters:
        listed = actual_by_name.get(wanted.adapter.name, {})
        pinned = listed.get("pinned", ())
        if listed.get("current") != wanted.adapter.engine_name:
            publish.append(Step("publish", wanted.adapter.name, wanted.adapter.revision, wanted.artifact))
        if wanted.pinned and wanted.adapter.engine_name not in pinned:
            pin.append(Step("pin", wanted.adapter.name, wanted.adapter.revision))
        unpin += [_unpin(name) for name in pinned if not (wanted.pinned and name == wanted.adapter.engine_name)]
    others = _others(desired, actual) if desired.retire_others else []
    unpin += [_unpin(name) for listed in others for name in listed["pinned"]]
    return (*publish, *pin, *unpin, *(Step("retire", listed["name"]) for listed in others))


def apply(desired: DesiredState, steps: Sequence[Step], client: AdminClient) -> dict[Step, ServeError | ConvertError]:
    """Takes the steps in their order. Returns those that failed, with the reasons.

    After a failure the later steps of the same name are skipped, but not those of other names, so that one bad adapter
    blocks no other. No pool is removed if one could not be added: the old one may be what the new one should replace.
    A repetition of `steps_to` and `apply` takes the remaining steps.
    """
    failed: dict[Step, ServeError | ConvertError] = {}
    for step in steps:
        if any(step.waits_for(failed_step) for failed_step in failed):
            continue
        try:
            _take(step, client, f"as desired by {desired.path.name}")
        except (ServeError, ConvertError) as error:
            failed[step] = error
    return failed


def _take(step: Step, client: AdminClient, reason: str) -> None:
    if step.verb == "publish" and step.artifact:
        client.publish(step.artifact, step.name, reason=reason)
    elif step.verb == "retire":
        client.retire(step.name, reason)
    elif step.pool:
        pool = step.pool
        added = client.add_pool(pool.artifact, pool.name, pool.replicas, pool.max_lora_rank, reason, pool.options)
        client.wait_for_pool(added["name"])
    elif step.verb == "remove pool":
        client.remove_pool(step.name, reason)
    else:
        client.change(step.verb, step.name, step.revision, reason)


def _read_file(path: Path) -> _AdaptersFile:
    try:
        return _AdaptersFile.model_validate(load_yaml(path.read_text()))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DesiredStateInvalid(f"{path} can't be read: {' '.join(str(error).split())}.") from error
    except ValidationError as error:
        raise DesiredStateInvalid(f"{path} does not say what there shall be: {problems_of(error)}.") from error


def _resolve(path: Path, entry: _AdapterEntry) -> DesiredAdapter:
    root = _root_of(path, entry)
    try:
        candidate = candidate_of(Artifact.open(root), entry.name)
    except (ArtifactInvalid, ArtifactRefused) as error:
        raise DesiredStateInvalid(f"{path} names {entry.artifact}: {error}") from error
    return DesiredAdapter(candidate.adapter, candidate.base, candidate.rank, entry.pinned, root)


def _resolve_pool(path: Path, entry: _PoolEntry) -> DesiredPool:
    root = _root_of(path, entry).absolute()
    try:
        base = Artifact.open(root).manifest.model.fingerprint
    except ArtifactInvalid as error:
        raise DesiredStateInvalid(f"{path} names {entry.artifact}: {error}") from error
    return DesiredPool(base, root, entry.name, entry.replicas, entry.max_lora_rank, PoolOptions.of(entry))


def _root_of(path: Path, entry: _AdapterEntry | _PoolEntry) -> Path:
    return path.parent / entry.artifact


def _others(desired: DesiredState, actual: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The listed adapters that the file does not name."""
    names = {wanted.adapter.name for wanted in desired.adapters}
    return [listed for listed in actual if listed["name"] not in names]


def _unpin(engine_name: str) -> Step:
    name, _, revision = engine_name.partition("@")
    return Step("unpin", name, revision)
