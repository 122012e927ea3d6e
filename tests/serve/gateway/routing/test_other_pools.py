"""A pool that is added while a replica runs: the replica knows it as soon as it has followed the catalogue."""

from __future__ import annotations

from pathlib import Path

from serve.catalogue.adapter_store import AdapterStore
from serve.catalogue.added_pool import AddedPool
from serve.catalogue.entry import Audit
from serve.catalogue.pool_changes import add_pool, remove_pool
from tests.serve.gateway.routing.two_pools import MERGED, two_pools


async def test_a_replica_forwards_to_a_pool_from_its_entry_until_its_removal(
    store: AdapterStore, tmp_path: Path
) -> None:
    async with two_pools(store, tmp_path, second_is_added=True) as (first, second):
        unknown = await first.ask("ticket")
        assert (unknown.status_code, (await first.get("/health/ticket"))["error"]["code"]) == (404, "model_not_found")
        unnamed = await first.ask(None)
        assert unnamed.json()["pool"] == "small-llama", "with one pool its base model answers"

        added = AddedPool(
            name="ticket", base=MERGED, model_path=tmp_path, max_lora_rank=0,
            max_active_adapters=4, max_resident_adapters=16,
        )  # fmt: skip
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
