"""A pool that is added while a replica runs: the replica knows it as soon as it has followed the catalogue."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.callers import key_admin
from serve.callers.keys import Key
from serve.catalogue.adapter_store import AdapterStore
from serve.catalogue.added_pool import AddedPool
from serve.catalogue.entry import Audit
from serve.catalogue.pool_changes import add_pool, move_alias, remove_pool
from tests.serve.gateway.routing.two_pools import MERGED, PIRATE, two_pools


async def test_a_replica_forwards_to_a_pool_from_its_entry_until_its_removal(
    store: AdapterStore, tmp_path: Path
) -> None:
    async with two_pools(store, tmp_path, second_is_added=True) as (first, second):
        unknown = await first.ask("ticket")
        assert (unknown.status_code, (await first.get("/health/ticket"))["error"]["code"]) == (404, "model_not_found")
        unnamed = await first.ask(None)
        assert unnamed.json()["pool"] == "small-llama", "with one pool its base model answers"

        added = AddedPool(name="ticket", base=MERGED, model_path=tmp_path, max_lora_rank=0)
        add_pool(first.log, added, [], Audit())
        await first.reconciler.follow()
        answer = await first.ask("ticket")
        assert (answer.status_code, answer.json()["pool"]) == (200, "ticket")
        assert [card["id"] for card in (await first.get("/v1/models"))["data"]] == ["small-llama", "ticket", "pirate"]
        assert (await first.ask(None)).json()["error"]["code"] == "model_missing"

        remove_pool(second.log, "ticket", [], Audit())
        await first.reconciler.follow()
        assert (await first.ask("ticket")).status_code == 404
        assert [card["id"] for card in (await first.get("/v1/models"))["data"]] == ["small-llama", "pirate"]


@pytest.mark.parametrize("at", [0, 1])
async def test_a_name_that_points_to_a_pool_is_answered_there_and_by_its_adapter_after_a_rollback(
    store: AdapterStore, tmp_path: Path, at: int
) -> None:
    async with two_pools(store, tmp_path) as pools:
        adapters, merged = pools
        move_alias(adapters.log, "pirate", merged.settings, Audit())
        for replica in pools:
            await replica.reconciler.follow()

        answer = await pools[at].ask("pirate")
        assert (answer.json()["pool"], answer.json()["model"]) == ("ticket", "ticket"), "what the engine knows"
        assert answer.headers["x-graft-model"] == "ticket"
        revision = await pools[at].ask(PIRATE.adapter.engine_name)
        assert revision.headers["x-graft-model"] == PIRATE.adapter.engine_name, "the adapter is still there"
        pinned = await pools[at].get(f"/v1/models/{PIRATE.adapter.engine_name}")
        assert (pinned["id"], pinned["root"], pinned["parent"]) == (*[PIRATE.adapter.engine_name] * 2, "small-llama")
        card = await pools[at].get("/v1/models/pirate")
        assert (card["id"], card["root"], card["parent"]) == ("pirate", "ticket", None)

        adapters.log.roll_back(PIRATE)
        for replica in pools:
            await replica.reconciler.follow()
        assert (await pools[at].ask("pirate")).headers["x-graft-model"] == PIRATE.adapter.engine_name


@pytest.mark.parametrize("behind", [0, 1])
@pytest.mark.parametrize("back", [False, True])
async def test_no_request_fails_while_one_replica_knows_of_a_move_and_the_other_does_not(
    store: AdapterStore, tmp_path: Path, behind: int, back: bool
) -> None:
    async with two_pools(store, tmp_path) as pools:
        if back:
            move_alias(pools[0].log, "pirate", pools[1].settings, Audit())
            for replica in pools:
                await replica.reconciler.follow()
            pools[0].log.roll_back(PIRATE)
        else:
            move_alias(pools[0].log, "pirate", pools[1].settings, Audit())
        await pools[1 - behind].reconciler.follow()

        before, after = "ticket", PIRATE.adapter.engine_name
        if not back:
            before, after = after, before
        asks_itself = (behind == 0) != back  # by what it knows; else it asks the other one, which knows more
        for replica, expected in (
            (pools[behind], before if asks_itself else after),
            (pools[1 - behind], after),
        ):
            answer = await replica.ask("pirate")
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-graft-model"] == expected


async def test_a_key_for_the_name_alone_may_use_it_wherever_it_points_and_is_counted_under_it(
    store: AdapterStore, tmp_path: Path
) -> None:
    secret = key_admin.create(
        tmp_path / "keys.json", lambda secrets: Key(id="team", secrets=secrets, models=("pirate",))
    )
    async with two_pools(store, tmp_path, keys_file=tmp_path / "keys.json") as (adapters, merged):
        move_alias(adapters.log, "pirate", merged.settings, Audit())
        for replica in (adapters, merged):
            await replica.reconciler.follow()
        bearer = {"authorization": f"Bearer {secret}"}

        for replica in (adapters, merged):
            assert (await replica.ask("pirate", **bearer)).status_code == 200
            assert (await replica.ask("ticket", **bearer)).status_code == 404
            assert (await replica.ask("small-llama", **bearer)).status_code == 404


async def test_a_name_that_points_to_a_pool_which_is_not_there_is_answered_by_its_adapter(
    store: AdapterStore, tmp_path: Path
) -> None:
    """A server can be started without a pool that it had."""
    async with two_pools(store, tmp_path, second_is_added=True) as (first, second):
        move_alias(first.log, "pirate", second.settings, Audit())
        await first.reconciler.follow()

        answer = await first.ask("pirate")

        assert (answer.status_code, answer.headers["x-graft-model"]) == (200, PIRATE.adapter.engine_name)
        assert (await first.get("/v1/models/pirate"))["root"] == PIRATE.adapter.engine_name
