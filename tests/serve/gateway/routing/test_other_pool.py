"""A request arrives at a replica of one pool, and its model belongs to another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from serve.callers import key_admin
from serve.callers.keys import Key
from serve.catalogue.adapter_store import AdapterStore
from serve.follower.http_client import direct_async_client
from serve.gateway.public_routes import ENGINE_ROUTES
from serve.gateway.routing import other_pool
from serve.gateway.routing.peers import MAX_REPORT_AGE_S
from tests.serve.conftest import candidate
from tests.serve.gateway.routing.two_pools import PIRATE, Replica, two_pools

Pools = tuple[Replica, Replica]
NAMES = ["small-llama", "ticket", "pirate"]


@pytest.fixture
async def pools(store: AdapterStore, tmp_path: Path) -> AsyncIterator[Pools]:
    async with two_pools(store, tmp_path) as pools:
        yield pools


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize(
    ("model", "pool", "engine_name"),
    [
        ("small-llama", "small-llama", "small-llama"),
        ("pirate", "small-llama", PIRATE.adapter.engine_name),
        (PIRATE.adapter.engine_name, "small-llama", PIRATE.adapter.engine_name),
        ("ticket", "ticket", "ticket"),
    ],
)
async def test_every_replica_answers_for_every_model_and_the_right_pool_runs_it(
    pools: Pools, at: int, model: str, pool: str, engine_name: str
) -> None:
    answer = await pools[at].ask(model)

    assert (answer.status_code, answer.json()["pool"]) == (200, pool)
    assert answer.json()["model"] == engine_name or model == engine_name == answer.json()["model"]
    assert answer.json()["path"] == "/v1/completions", "the engine does not see the prefix of the pool"
    assert answer.headers.get_list("x-graft-model") == [engine_name]
    assert pools[at].peers.forwarded == (pools[at].name != pool)


async def test_each_engine_holds_the_adapters_of_its_own_base_model_only(pools: Pools) -> None:
    with_adapter, merged = pools
    await merged.ask("pirate")

    assert with_adapter.engine.resident == {PIRATE.adapter}
    assert merged.engine.loads == []


async def test_every_replica_lists_the_models_of_all_pools_in_the_same_way(pools: Pools) -> None:
    pools[1].engine.context_tokens = 32
    lists = [await replica.get("/v1/models") for replica in pools]

    assert lists[0] == lists[1]
    cards = {card["id"]: card for card in lists[0]["data"]}
    assert list(cards) == NAMES
    assert [cards[name]["parent"] for name in NAMES] == [None, None, "small-llama"]
    assert [cards[name]["max_model_len"] for name in NAMES] == [64, 32, 64]
    for name in NAMES:
        assert [await replica.get(f"/v1/models/{name}") for replica in pools] == [cards[name]] * 2


@pytest.mark.parametrize("at", [0, 1])
async def test_an_unknown_model_is_not_found_in_the_form_of_the_api_whoever_is_asked(pools: Pools, at: int) -> None:
    answer = await pools[at].ask("italian")

    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert "pirate, small-llama, ticket" in answer.json()["error"]["message"]
    assert "x-graft-epoch" not in answer.headers


@pytest.mark.parametrize("at", [0, 1])
async def test_a_request_that_names_no_model_is_refused_because_there_are_several(pools: Pools, at: int) -> None:
    answer = await pools[at].ask(None)

    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "model_missing")


async def test_a_request_that_found_no_replica_does_not_wait_again_when_the_proxy_repeats_it(
    pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = pools
    monkeypatch.setattr(other_pool, "_FIND_WITHIN_S", 0.1)
    monkeypatch.setattr(other_pool, "_OUT_OF_REACH_S", 600)
    there.reachable = False
    assert (await here.ask("ticket")).status_code == 503

    monkeypatch.setattr(other_pool, "_FIND_WITHIN_S", 600)  # longer than the client waits
    assert (await here.ask("ticket")).json()["error"]["code"] == "pool_unavailable"
    there.reachable = True
    await asyncio.sleep(MAX_REPORT_AGE_S)
    assert (await here.ask("ticket")).status_code == 200, "it is asked as soon as it reports"


async def test_a_pool_that_cannot_be_reached_takes_no_other_with_it(
    pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = pools
    monkeypatch.setattr(other_pool, "_FIND_WITHIN_S", 0.1)
    there.reachable = False

    refused = await here.ask("ticket")

    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "pool_unavailable")
    assert refused.headers["retry-after"] == "1"
    assert (await here.ask("pirate")).status_code == 200
    assert [await health(here, name) for name in ("small-llama", "ticket", "pirate")] == [200, 503, 404]
    assert [card["id"] for card in (await here.get("/v1/models"))["data"]] == NAMES, "it still has its names"


async def health(replica: Replica, name: str) -> int:
    async with direct_async_client() as client:
        return (await client.get(f"{replica.url}/health/{name}")).status_code


async def test_a_busy_pool_says_so_itself(pools: Pools) -> None:
    here, there = pools
    there.engine.is_dead = True

    assert (await here.ask("ticket")).json()["error"]["code"] == "engine_unavailable"


async def test_a_pool_that_does_not_know_the_model_yet_catches_up_before_it_answers(pools: Pools) -> None:
    with_adapter, merged = pools
    new = candidate("sailor", "weights of a sailor")
    merged.log.stage(new)
    merged.log.promote(new)
    await merged.reconciler.sync()
    assert with_adapter.reconciler.catalogue.epoch < merged.reconciler.catalogue.epoch

    answer = await merged.ask("sailor")

    assert (answer.status_code, answer.json().get("model")) == (200, new.adapter.engine_name)


async def test_a_model_that_is_gone_by_the_newest_catalogue_is_unknown(pools: Pools) -> None:
    with_adapter, merged = pools
    with_adapter.log.retire("pirate")
    await with_adapter.reconciler.sync()

    answer = await merged.ask("pirate")

    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert "x-graft-epoch" not in answer.headers


async def test_what_one_engine_does_not_offer_is_asked_of_the_other_which_may(
    store: AdapterStore, tmp_path: Path
) -> None:
    routes = tuple(route for route in ENGINE_ROUTES if route != "/v1/embeddings")
    async with two_pools(store, tmp_path, first_offers=routes) as (here, there):
        assert (await here.ask("ticket", "/v1/embeddings")).json()["path"] == "/v1/embeddings"
        assert (await there.ask("small-llama", "/v1/embeddings")).json()["error"]["code"] == "task_unsupported"


async def test_a_key_reaches_the_models_that_it_may_use_in_every_pool_and_no_other(
    store: AdapterStore, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.json"
    secret = key_admin.create(keys, lambda secrets: Key(id="desk", secrets=secrets, models=("ticket",)))
    async with two_pools(store, tmp_path, keys_file=keys) as pools:
        statuses = {
            (at, model): (await pools[at].ask(model, authorization=f"Bearer {secret}")).status_code
            for at in (0, 1)
            for model in NAMES
        }

    assert {at_model for at_model, status in statuses.items() if status == 200} == {(0, "ticket"), (1, "ticket")}
    assert set(statuses.values()) == {200, 404}
