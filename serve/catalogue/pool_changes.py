"""Adding pools to a server, removing them, and pointing an alias to one, as entries of the catalogue's log. All raise
StoreUnavailable and StateInvalid as the log does."""

from __future__ import annotations

from collections.abc import Sequence

from serve.catalogue.added_pool import AddedPool
from serve.catalogue.catalogue import Catalogue
from serve.catalogue.entry import Audit, Entry, PoolEntry
from serve.catalogue.log import CatalogueLog
from serve.errors import TransitionRefused, UnknownModel
from serve.settings import PoolSettings, ServeSettings

_SHOWN_ADAPTERS = 5


def pools_of(settings: ServeSettings, catalogue: Catalogue) -> tuple[PoolSettings, ...]:
    """All pools of the server: the one of the settings, those that it was started with, and those that were added. Of
    two pools with one base model the first counts."""
    pools: dict[str, PoolSettings] = {settings.engine.fingerprint: settings}
    for pool in (*settings.other_pools, *(added.settings for added in catalogue.pools.values())):
        pools.setdefault(pool.engine.fingerprint, pool)
    return tuple(pools.values())


def add_pool(log: CatalogueLog, pool: AddedPool, given: Sequence[PoolSettings], audit: Audit) -> Catalogue:
    """Record a pool, which the server then starts; nothing happens if it is recorded already. `given`: the pools that
    the server was started with. Raises TransitionRefused if the name or the base model is taken."""

    def decide(catalogue: Catalogue) -> PoolEntry | None:
        if catalogue.pools.get(pool.name) == pool:
            return None
        _check_free(pool, given, catalogue)
        return PoolEntry.now("add_pool", pool, audit)

    return log.append(decide)


def remove_pool(log: CatalogueLog, name: str, given: Sequence[PoolSettings], audit: Audit) -> Catalogue:
    """Record that a pool which was added is no longer wanted. Raises UnknownModel if there is none of that name,
    TransitionRefused for one that the server was started with, or while adapters for it are live."""

    def decide(catalogue: Catalogue) -> PoolEntry:
        if any(pool.engine.model_name == name for pool in given):
            raise TransitionRefused(f"{name} was given to `run`, and is served until the server stops.")
        if (pool := catalogue.pools.get(name)) is None:
            raise UnknownModel(name, catalogue.pools)
        if aliases := sorted(alias for alias, state in catalogue.adapters.items() if state.pool == name):
            raise TransitionRefused(f"{name} answers for {', '.join(aliases[:_SHOWN_ADAPTERS])}: roll back first.")
        if adapters := sorted(catalogue.of_base(pool.base).adapters):
            named = ", ".join(adapters[:_SHOWN_ADAPTERS])
            more = f" and {len(adapters) - _SHOWN_ADAPTERS} more" if len(adapters) > _SHOWN_ADAPTERS else ""
            raise TransitionRefused(f"{name} is the base model of {named}{more}: retire them first.")
        return PoolEntry.now("remove_pool", pool, audit)

    return log.append(decide)


def move_alias(log: CatalogueLog, name: str, pool: PoolSettings, audit: Audit) -> Catalogue:
    """Point an alias to a pool; nothing happens if it points there already. The adapter stays loaded, so that a
    rollback is one entry, too. Raises UnknownModel if there is no such alias, TransitionRefused if the
    pool is that of the adapter's own base model, or is not there any more."""
    model = pool.engine.model_name

    def decide(catalogue: Catalogue) -> Entry | None:
        state = catalogue.state_of(name)
        if state.current is None:
            raise UnknownModel(name, {adapter.name for adapter in catalogue.current})
        if state.pool == model:
            return None
        if state.current.candidate.base == pool.engine.fingerprint:
            raise TransitionRefused(f"{model} is the base model of {name}, without what was trained.")
        if pool.added and model not in catalogue.pools:
            raise TransitionRefused(f"The pool {model} was removed meanwhile.")
        return Entry.now("move", state.current.candidate, audit, pool=model)

    return log.append(decide)


def _check_free(pool: AddedPool, given: Sequence[PoolSettings], catalogue: Catalogue) -> None:
    names = {known.engine.model_name for known in given} | catalogue.pools.keys()
    bases = {known.engine.fingerprint: known.engine.model_name for known in given}
    bases |= {known.base: name for name, known in catalogue.pools.items()}
    if pool.base in bases:
        served_as = bases[pool.base]
        raise TransitionRefused(f"That model is served here already, as {served_as}: remove it first to change it.")
    if pool.name in names or catalogue.state_of(pool.name).live_bases:
        raise TransitionRefused(f"The name {pool.name} is taken by another model: add this one under another --name.")
