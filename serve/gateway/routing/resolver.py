"""Resolves the `model` of a request: to the pool that answers it, and there to the base model or to a revision."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from serve.adapters.canary import RevisionChoice
from serve.adapters.rollout import Rollouts
from serve.callers.keys import Key
from serve.catalogue.catalogue import Catalogue
from serve.errors import ModelMissing, UnknownModel
from serve.gateway.routing.other_pool import OtherPool
from serve.gateway.routing.other_pools import OtherPools
from serve.names import AdapterRevision, RequestedModel


class ModelResolver:
    """Knows every name of the server: the base models of all pools, and the adapters of the catalogue."""

    def __init__(
        self,
        base_model: str,
        catalogue: Callable[[], Catalogue],
        rollouts: Rollouts,
        other_pools: OtherPools,
    ) -> None:
        """`base_model`: of this replica's own pool; `rollouts` choose the revision for callers of an adapter that has a
        canary."""
        self.base_model = base_model
        self._catalogue = catalogue
        self._rollouts = rollouts
        self._other_pools = other_pools

    def epoch(self) -> int:
        """How far this replica has followed the catalogue."""
        return self._catalogue().epoch

    def other_pool(self, model: str | None, key: Key | None) -> OtherPool | None:
        """The other pool that answers requests for `model`; None if this replica answers them, or says that there is
        no such model. Raises UnknownModel for a model that the caller's key may not use, and ModelMissing: with several
        pools every request must name its model."""
        if not self._other_pools.all():
            return None
        if model is None:
            raise ModelMissing
        if model == self.base_model:
            return None
        pool = self._other_pools.named(model)
        name = RequestedModel.parse(model)
        if pool is None and (model_of_pool := self._pool_of_name(name)):
            pool = self._other_pools.named(model_of_pool)
        elif pool is None and (adapter := self._catalogue().resolve(name)):
            pool = self.pool_of(adapter)
        if pool is not None and key is not None and not key.may_use(name.name):
            raise UnknownModel(model, self.known(key))
        return pool

    def pool_of(self, adapter: AdapterRevision) -> OtherPool | None:
        """The other pool whose base model an adapter of the catalogue is made for; None: this replica's own."""
        return self._other_pools.of_base(self._catalogue().candidate(adapter).base)

    def resolve(self, model: str | None, caller: str, key: Key | None) -> RevisionChoice | None:
        """The revision that answers a request for `model`; None for the base model, also where an alias points to it.
        Raises UnknownModel, also for a model of another pool, or that the caller's key may not use."""
        catalogue = self._catalogue()
        if model is None or model == self.base_model:
            if key is None or key.may_use(self.base_model):
                return None
            raise UnknownModel(model or "", self.known(key))
        requested = RequestedModel.parse(model)
        model_of_pool, adapter = self._pool_of_name(requested), catalogue.resolve(requested)
        if adapter is None or (key is not None and not key.may_use(adapter.name)):
            raise UnknownModel(model, self.known(key))
        if model_of_pool == self.base_model:
            return None
        if model_of_pool or self.pool_of(adapter):
            raise UnknownModel(model, self.known(key))
        return RevisionChoice(adapter) if requested.revision else self._rollouts.choose(catalogue, adapter, caller)

    def public_name(self, model: str | None) -> str:
        """What a request for this replica's base model is counted as: an alias that points to it, or its own name."""
        if model is None:
            return self.base_model
        requested = RequestedModel.parse(model)
        return requested.name if self._pool_of_name(requested) == self.base_model else self.base_model

    def _pool_of_name(self, requested: RequestedModel) -> str | None:
        """The pool that an alias points to, if the server has it: it may have been started without. The adapter answers
        then."""
        model = self._catalogue().pool_of_name(requested)
        is_here = model is not None and (model == self.base_model or self._other_pools.named(model) is not None)
        return model if is_here else None

    def known(self, key: Key | None) -> set[str]:
        """The model names that a caller with this key may see."""
        return {name for name in self._names() if key is None or key.may_use(name)}

    def _names(self) -> Iterator[str]:
        yield self.base_model
        yield from (pool.name for pool in self._other_pools.all())
        yield from (current.name for current in self._catalogue().current)
