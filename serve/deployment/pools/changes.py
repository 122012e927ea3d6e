"""serve.admin.pool_routes.Pools: a replica records what pools there should be, and asks Ray Serve how far they are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import ray
from ray import serve as ray_serve

from convert.artifact import MANIFEST, Artifact
from convert.errors import ArtifactInvalid
from serve.adapters.ingest import allowed_directory, check_no_links
from serve.adapters.publish import Replicas
from serve.admin.pool_routes import NewPool, PoolView
from serve.catalogue.adapter_state import Revision
from serve.catalogue.added_pool import AddedPool
from serve.catalogue.catalogue import Catalogue
from serve.catalogue.entry import Audit
from serve.catalogue.log import CatalogueLog
from serve.catalogue.pool_changes import add_pool, check_free, move_alias, pools_of, remove_pool, sleep_pool, wake_pool
from serve.catalogue.storage.file_threads import to_file_thread
from serve.deployment.pools.application_status import attempt_failed, ready_replicas, reason_of, state_of
from serve.deployment.pools.bundle import Bundle, bundles_of, weight_bytes
from serve.deployment.pools.room import check_arguments, check_memory, needed_rank
from serve.errors import (
    ArtifactRefused,
    EngineRefused,
    MemoryShort,
    PathRefused,
    PoolAsleep,
    PoolRefused,
    PoolUnavailable,
    PublishUnconfirmed,
    ReplicaUnreachable,
    TransitionRefused,
    UnknownModel,
)
from serve.observability.memory import memory_left
from serve.settings import EngineSettings, PoolOptions, PoolSettings, ServeSettings

_MAX_REASON_CHARACTERS = 300
_FIXED = (
    "The pools of this server are those that it was started with: no process of its own starts others. "
    "Start it with the artifact as well."
)


class PoolChanges:
    """The pools as one replica sees and changes them."""

    def __init__(
        self,
        settings: ServeSettings,
        log: CatalogueLog,
        replicas: Replicas,
        check_engine: Callable[[EngineSettings], object] = check_arguments,
    ) -> None:
        """`check_engine` raises EngineRefused if an engine can't be started with the settings."""
        self._settings = settings
        self._log = log
        self._replicas = replicas
        self._check_engine = check_engine
        self._waking = asyncio.Lock()
        self._given = [pool for pool in (settings, *settings.other_pools) if not pool.added]

    async def add(self, pool: NewPool, audit: Audit) -> PoolView:
        self._require_changeable()
        bundle = await to_file_thread("admin", self._bundle, pool)
        catalogue = await asyncio.to_thread(self._log.read)
        added = _added(pool, bundle, catalogue)
        if not added.is_same_as(catalogue.pools.get(added.name)):
            check_free(added, self._given, catalogue)
            await to_file_thread("admin", self._check_settings, added)
            await self._check_room(added, catalogue)
        await asyncio.to_thread(add_pool, self._log, added, self._given, audit)
        return await self._view_of(added.name)

    async def remove(self, name: str, audit: Audit) -> None:
        self._require_changeable()
        await asyncio.to_thread(remove_pool, self._log, name, self._given, audit)

    async def wake(self, name: str) -> datetime:
        """Records that a pool is woken, and returns when it was. Raises PoolAsleep if there is no room for it now."""
        async with self._waking:  # one after the other: what the first one takes is not there for the second
            catalogue = await asyncio.to_thread(self._log.read)
            if (pool := catalogue.pools.get(name)) is None or not self._settings.takes_pools:
                raise PoolUnavailable(name)
            try:
                if pool.asleep:
                    await self._check_room_to_wake(pool, catalogue)
            except PoolRefused as error:
                raise PoolAsleep(name, f"it can't start now: {error}") from error
            catalogue = await asyncio.to_thread(wake_pool, self._log, name, Audit("graft", "a request"))
            if (woken := catalogue.pools.get(name)) is None:
                raise PoolUnavailable(name)
            return woken.woken_at or datetime.now(UTC)

    async def give_up(self, name: str) -> None:
        """Records that a pool which may sleep is asleep, if its engines can't start: the next request wakes it, and so
        tries it again."""
        pool = (await asyncio.to_thread(self._log.read)).pools.get(name)
        if pool and not pool.asleep and (view := await self._view_of(name)).state == "failed":
            why = f"its engines did not start: {view.reason}"[:_MAX_REASON_CHARACTERS]
            await asyncio.to_thread(sleep_pool, self._log, pool, Audit("graft", why))

    async def move(self, name: str, pool: str, audit: Audit) -> int:
        catalogue = await asyncio.to_thread(self._log.read)
        target = next((known for known in pools_of(self._settings, catalogue) if known.engine.model_name == pool), None)
        if target is None:
            raise UnknownModel(pool, {known.engine.model_name for known in pools_of(self._settings, catalogue)})
        if (view := await self._view_of(pool)).state not in ("running", "asleep"):
            raise TransitionRefused(f"The pool {pool} is {view.state}: an alias is pointed to one that answers.")
        await asyncio.to_thread(_check_origin, target, catalogue.state_of(name).current)
        epoch = (await asyncio.to_thread(move_alias, self._log, name, target, audit)).epoch
        return await self._confirm(f"{name} is moved to {pool}", epoch)

    async def _view_of(self, name: str) -> PoolView:
        """Raises TransitionRefused if the pool is gone, or if another pool of its model is served instead."""
        view = next((view for view in await self.all() if view.name == name), None)
        if view is None:
            raise TransitionRefused(f"The pool {name} was removed meanwhile, or its model has another name here.")
        return view

    async def _confirm(self, change: str, epoch: int) -> int:
        try:
            reports = await self._replicas.sync()
        except ReplicaUnreachable as error:
            raise PublishUnconfirmed(f"{change}, but not every replica confirmed it: {error}") from error
        if behind := sorted(report.replica for report in reports if report.epoch < epoch):
            raise PublishUnconfirmed(f"{change}, but these replicas do not follow yet: {', '.join(behind)}.")
        return len(reports)

    async def all(self) -> Sequence[PoolView]:
        catalogue, status = await asyncio.gather(asyncio.to_thread(self._log.read), asyncio.to_thread(ray_serve.status))
        pools = pools_of(self._settings, catalogue)
        views = [_view(pool, catalogue, status.applications.get(pool.application)) for pool in pools]
        return sorted(views, key=lambda view: view.name)

    def _require_changeable(self) -> None:
        """Raises PoolRefused."""
        if not self._settings.takes_pools:
            raise PoolRefused(_FIXED)

    def _bundle(self, pool: NewPool) -> Bundle:
        """What the artifact holds. Raises PathRefused, or PoolRefused with the reason."""
        roots = self._settings.admission.artifact_roots
        if not roots:
            raise PathRefused("This server takes no artifacts from callers: start it with --artifact-root DIR.")
        path = allowed_directory(pool.path, roots)
        if not (path / MANIFEST).is_file():
            raise PoolRefused(f"{path} is no artifact: it has no {MANIFEST}. Make one with: python -m convert run")
        check_no_links(path)
        try:
            (bundle,) = bundles_of([path], {None: pool.name} if pool.name else None)
        except ArtifactRefused as error:
            raise PoolRefused(str(error)) from error
        return bundle

    def _check_settings(self, pool: AddedPool) -> None:
        """Raises PoolRefused with vLLM's reason. An engine would be started again and again with wrong arguments."""
        try:
            self._check_engine(pool.settings(self._given[0].engine).engine)
        except EngineRefused as error:
            raise PoolRefused(str(error)) from error

    async def _check_room_to_wake(self, pool: AddedPool, catalogue: Catalogue) -> None:
        """Raises PoolRefused. What the pool's own engines still hold, which are being stopped, will be there for it."""
        status = await asyncio.to_thread(ray_serve.status)
        if pool.application not in status.applications:
            await self._check_room(pool, catalogue)

    async def _check_room(self, added: AddedPool, catalogue: Catalogue) -> None:
        """Raises PoolRefused. Memory that a pool which starts will take is not there for another one."""
        if self._settings.gpus_per_replica:
            _check_gpus(added.replicas * self._settings.gpus_per_replica)
            return
        starting = {view.base for view in await self.all() if view.state == "starting"}
        pools = [pool for pool in catalogue.pools.values() if pool.base in starting]
        promised = sum(pool.replicas * weight_bytes(pool.model_path) for pool in pools)
        try:
            needed = {added.name: added.replicas * weight_bytes(added.model_path)}
            check_memory(needed, max(0, memory_left().available - promised))
        except MemoryShort as error:
            raise PoolRefused(str(error)) from error


def _added(pool: NewPool, bundle: Bundle, catalogue: Catalogue) -> AddedPool:
    """The pool as it is recorded. Raises PoolRefused for a rank that vLLM does not serve."""
    wanted = [candidate for candidate in catalogue.wanted if candidate.base == bundle.fingerprint]
    try:
        return AddedPool(
            name=bundle.model_name,
            base=bundle.fingerprint,
            model_path=bundle.model_path,
            replicas=pool.replicas,
            max_lora_rank=needed_rank(pool.max_lora_rank, [bundle.max_lora_rank], wanted),
            options=PoolOptions.of(pool),
        )
    except ValueError as error:  # pydantic's ValidationError too
        raise PoolRefused(f"The pool can't be added: {error}.") from error


def _check_origin(pool: PoolSettings, current: Revision | None) -> None:
    """Raises TransitionRefused if the pool's model was made of another checkpoint than the adapter. What is not known,
    as of a model that is no artifact, is left to who asks."""
    if current is None or current.candidate.base == pool.engine.fingerprint:
        return  # refused for another reason
    lineage = current.candidate.lineage
    try:
        origin = Artifact.open(pool.engine.model_path.parent).manifest.origin.digest
    except ArtifactInvalid:
        return
    if lineage and None not in (origin, lineage.origin) and origin != lineage.origin:
        raise TransitionRefused(
            f"{pool.engine.model_name} was made of another checkpoint than {current.candidate.adapter}: "
            "convert that adapter's checkpoint with --route merge, and add the result."
        )


def _check_gpus(needed: float) -> None:
    """Raises PoolRefused; Ray Serve would wait for missing GPUs for ever."""
    free = ray.available_resources().get("GPU", 0)
    if needed > free:
        raise PoolRefused(f"The engines of the pool need {needed:g} GPUs, and {free:g} are free.")


def _view(pool: PoolSettings, catalogue: Catalogue, application: Any) -> PoolView:
    recorded = catalogue.pools.get(pool.engine.model_name) if pool.added else None
    state = "asleep" if pool.asleep else state_of(application)
    has_failed = state == "failed" or (state == "starting" and application is not None and attempt_failed(application))
    return PoolView(
        name=pool.engine.model_name,
        base=pool.engine.fingerprint,
        kind="base model" if pool.engine.max_lora_rank else "merged model",
        added=pool.added,
        state=state,
        replicas=pool.replicas,
        max_lora_rank=pool.engine.max_lora_rank,
        max_active_adapters=pool.engine.max_active_adapters,
        max_resident_adapters=pool.engine.max_resident_adapters,
        sleep_after_s=pool.sleep_after_s,
        vllm_args=recorded.options.vllm_args if recorded else (),
        ready=ready_replicas(application),
        reason=reason_of(application) if has_failed else "",
    )
