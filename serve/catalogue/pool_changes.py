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
    """All pools of the server: the one of the settings, those that it was started with, and those that were added. An
    added pool with the base model or the name of another one does not count."""
    pools: list[PoolSettings] = [settings, *settings.other_pools]
    first = next((pool for pool in pools if not pool.added), settings)
    bases = {pool.engine.fingerprint for pool in pools}
    names = {pool.engine.model_name for pool in pools}
    for added in catalogue.pools.values():
        if added.base not in bases and added.name not in names:
            pools.append(added.settings(first.engine))
            bases.add(added.base)
            names.add(added.name)
    return tuple(pools)


def given_bases(settings: ServeSettings) -> frozenset[str]:
    """The base models of the pools that the server was started with; none if it takes no others."""
    given = (pool for pool in (settings, *settings.other_pools) if not pool.added)
    return frozenset(pool.engine.fingerprint for pool in given) if settings.takes_pools else frozenset()


def add_pool(log: CatalogueLog, pool: AddedPool, given: Sequence[PoolSettings], audit: Audit) -> Catalogue:
    """Record a pool, which the server then starts; nothing happens if it is recorded already. `given`: the pools that
    the server was started with. Raises TransitionRefused if the name or the base model is taken."""

    def decide(catalogue: Catalogue) -> PoolEntry | None:
        if pool.is_same_as(catalogue.pools.get(pool.name)):
            return None
        check_free(pool, given, catalogue)
        return PoolEntry.now("add_pool", pool, audit)

    return log.append(decide)


def remove_pool(log: CatalogueLog, name: str, given: Sequence[PoolSettings], audit: Audit) -> Catalogue:
    """Record that a pool which was added is no longer wanted. Raises UnknownModel if there is none of that name,
    TransitionRefused for one that the server was started with, or while adapters for it are live."""
    names, bases = {pool.engine.model_name for pool in given}, {pool.engine.fingerprint for pool in given}

    def decide(catalogue: Catalogue) -> PoolEntry:
        if (pool := catalogue.pools.get(name)) is None:
            if name in names:
                raise TransitionRefused(f"{name} was given to `run`, and is served until the server stops.")
            raise UnknownModel(name, names | catalogue.pools.keys())
        if pool.base in bases or name in names:  # it is recorded, and what was given to `run` is served instead
            return PoolEntry.now("remove_pool", pool, audit)
        if aliases := sorted(alias for alias, state in catalogue.adapters.items() if state.pool == name):
            raise TransitionRefused(f"{name} answers for {', '.join(aliases[:_SHOWN_ADAPTERS])}: roll back first.")
        if adapters := sorted(catalogue.of_base(pool.base).adapters):
            named = ", ".join(adapters[:_SHOWN_ADAPTERS])
            more = f" and {len(adapters) - _SHOWN_ADAPTERS} more" if len(adapters) > _SHOWN_ADAPTERS else ""
            raise TransitionRefused(f"{name} is the base model of {named}{more}: retire them first.")
        return PoolEntry.now("remove_pool", pool, audit)

    return log.append(decide)


def sleep_pool(log: CatalogueLog, awake: AddedPool, audit: Audit) -> Catalogue:
    """Record that the engines of a pool which was added are stopped. Nothing happens if it is not `awake` any more, or
    if it has been woken since."""

    def decide(catalogue: Catalogue) -> PoolEntry | None:
        is_same = catalogue.pools.get(awake.name) == awake and not awake.asleep
        return PoolEntry.now("sleep_pool", awake.fallen_asleep(), audit) if is_same else None

    return log.append(decide)


def wake_pool(log: CatalogueLog, name: str, audit: Audit) -> Catalogue:
    """Record that the engines of a sleeping pool are started; nothing happens if it does not sleep, or is gone."""

    def decide(catalogue: Catalogue) -> PoolEntry | None:
        pool = catalogue.pools.get(name)
        return PoolEntry.now("wake_pool", pool.woken(), audit) if pool and pool.asleep else None

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


def check_free(pool: AddedPool, given: Sequence[PoolSettings], catalogue: Catalogue) -> None:
    """Raises TransitionRefused if the name or the base model of a new pool is taken."""
    names = {known.engine.model_name for known in given} | catalogue.pools.keys()
    bases = {known.engine.fingerprint: known.engine.model_name for known in given}
    bases |= {known.base: name for name, known in catalogue.pools.items()}
    if pool.base in bases:
        served_as = bases[pool.base]
        raise TransitionRefused(f"That model is served here already, as {served_as}: remove it first to change it.")
    if pool.name in names or catalogue.state_of(pool.name).live_bases:
        raise TransitionRefused(f"The name {pool.name} is taken by another model: add this one under another --name.")
