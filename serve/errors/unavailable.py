"""Errors that say "not now": a queue is full, a replica or a store can't be reached. All have the status 503, which the
proxy answers by asking another replica if it still holds the request."""

from __future__ import annotations

from serve.errors.http import Unavailable


class AdaptersExhausted(Unavailable):
    code = "adapters_exhausted"

    def __init__(self, capacity: int) -> None:
        super().__init__(
            f"All {capacity} adapters that this replica can hold are in use by running requests; try again."
        )


class AdapterQueueFull(Unavailable):
    code = "adapter_queue_full"

    def __init__(self, limit: int, retry_after_s: int) -> None:
        super().__init__(f"{limit} requests wait for an adapter slot of this replica already; try again later.")
        self.retry_after_s = retry_after_s


class AdapterWaitTooLong(Unavailable):
    code = "adapter_wait_too_long"

    def __init__(self, waited_s: float, retry_after_s: int) -> None:
        super().__init__(f"No adapter slot of this replica came free within {waited_s:g} s; try again later.")
        self.retry_after_s = retry_after_s


class EngineQueueFull(Unavailable):
    code = "engine_queue_full"

    def __init__(self, limit: int, retry_after_s: int) -> None:
        super().__init__(f"{limit} requests wait for this replica's engine already; try again later.")
        self.retry_after_s = retry_after_s


class EngineWaitTooLong(Unavailable):
    code = "engine_wait_too_long"

    def __init__(self, waited_s: float, retry_after_s: int) -> None:
        super().__init__(f"No place in this replica's engine came free within {waited_s:g} s; try again later.")
        self.retry_after_s = retry_after_s


class IssuerUnavailable(Unavailable):
    code = "issuer_unavailable"

    def __init__(self, retry_after_s: int) -> None:
        super().__init__("The keys of the identity provider can't be fetched at the moment; try again later.")
        self.retry_after_s = retry_after_s


class LimitsUnavailable(Unavailable):
    code = "limits_unavailable"

    def __init__(self) -> None:
        super().__init__("The limits of this key can't be checked at the moment; try again.")


class AdapterUnavailable(Unavailable):
    code = "adapter_unavailable"


class StoreUnavailable(Unavailable):
    """The store of the catalogue and the adapter files can't be reached. Requests for resident adapters are still
    served, and a retry of the failed call may succeed."""

    code, retry_after_s = "store_unavailable", 5


class ReplicaUnreachable(Unavailable):
    code = "replica_unreachable"


class EngineUnavailable(Unavailable):
    code = "engine_unavailable"

    def __init__(self) -> None:
        super().__init__("The engine of this replica stopped and is being replaced; try again.")


class PoolUnavailable(Unavailable):
    code = "pool_unavailable"

    def __init__(self, name: str) -> None:
        super().__init__(f"No engine of {name} can be reached at the moment, and other models here can; try again.")


class PoolAsleep(Unavailable):
    """A pool that sleeps, or has just been woken, can't take a request."""

    code, retry_after_s = "pool_asleep", 10

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name} was asleep, and {why}; try again later.")


class WrongReplica(Unavailable):
    code = "wrong_replica"

    def __init__(self) -> None:
        super().__init__("This request was passed on to a replica that is not here; try again.")


class HolderLost(Unavailable):
    code = "holder_lost"

    def __init__(self) -> None:
        super().__init__("The replica that answered this request ended before its response was complete; try again.")


class CatalogueBehind(Unavailable):
    code = "catalogue_behind"

    def __init__(self, waited_s: float) -> None:
        super().__init__(
            f"The model was changed, and this replica could not read the change from its store within {waited_s:g} s; "
            "try again."
        )


class BodyBudgetFull(Unavailable):
    code = "body_budget_full"

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(
            f"The bodies of the requests that this replica holds take all of the {limit_bytes} bytes that it keeps for "
            "them; try again."
        )
