"""The replicas of all pools are asked at once, and each pool only for what concerns it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from serve.adapters.reconcile import ReplicaReport
from serve.deployment import ray_replicas
from serve.deployment.ray_replicas import ServerReplicas
from serve.errors import ReplicaUnreachable


class Pool:
    """PoolReplicas without a Ray."""

    def __init__(self, name: str, *, reachable: bool = True, silent: bool = False) -> None:
        self.name = name
        self.reachable = reachable
        self.silent = silent
        self.awaited: list[str | None] = []

    async def sync(self, awaited: str | None = None) -> Sequence[ReplicaReport]:
        self.awaited.append(awaited)
        if self.silent:
            await asyncio.Event().wait()
        if not self.reachable:
            raise ReplicaUnreachable(self.name)
        return [ReplicaReport(replica=self.name, epoch=1, resident=(), running_requests=0, failures={})]


def server(**pools: Any) -> ServerReplicas:
    return ServerReplicas(lambda: pools)


async def test_a_change_waits_for_the_adapters_own_pool_and_the_other_one_follows() -> None:
    own, other = Pool("own"), Pool("other")

    reports = await server(a=own, b=other).sync("pirate@1", "a")

    assert [report.replica for report in reports] == ["own"]
    assert (own.awaited, other.awaited) == (["pirate@1"], [None]), "the other pool never holds that adapter"


@pytest.mark.parametrize("fault", [{"reachable": False}, {"silent": True}], ids=["down", "silent"])
async def test_a_pool_that_does_not_answer_stops_no_change_of_another(
    monkeypatch: pytest.MonkeyPatch, fault: dict[str, bool]
) -> None:
    monkeypatch.setattr(ray_replicas, "_OTHER_POOLS_S", 0.05)
    own, other = Pool("own"), Pool("other", **fault)

    assert [report.replica for report in await server(a=own, b=other).sync("pirate@1", "a")] == ["own"]
    with pytest.raises(ReplicaUnreachable, match="other"):
        await asyncio.wait_for(server(a=own, b=Pool("other", reachable=False)).sync("french@1", "b"), 5)


async def test_who_asks_for_all_replicas_gets_those_that_answer() -> None:
    both, one = Pool("a"), Pool("b", reachable=False)

    assert [report.replica for report in await server(a=both, b=Pool("b")).sync()] == ["a", "b"]
    assert [report.replica for report in await server(a=both, b=one).sync()] == ["a"]
    with pytest.raises(ReplicaUnreachable):
        await server(b=one).sync()
