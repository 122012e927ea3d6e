"""How many requests a change of the catalogue sends to a real S3 API server when the log has 200 entries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.adapters.pool import AdapterPool
from serve.adapters.publish import Control
from serve.adapters.reconcile import Reconciler
from serve.catalogue.adapter_store import AdapterStore
from serve.catalogue.catalogue import Catalogue
from serve.catalogue.log import SNAPSHOT_EVERY, CatalogueLog
from serve.catalogue.storage.bucket_store import BucketStore
from tests.object_store import bucket_url, s3_server
from tests.serve.conftest import candidate, verify_nothing
from tests.serve.fakes import FakeEngine
from tests.serve.one_replica import OneReplica

OLD, NEW, NEXT = (candidate("pirate", content) for content in ("old", "new", "next"))
ENTRIES = 200


@pytest.fixture
def operations() -> list[str]:
    """What the server was asked for."""
    return []


@pytest.fixture
def url(operations: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A log of 200 entries, in which `pirate` points to NEW and pointed to OLD before."""
    with s3_server(operations) as endpoint:
        url = bucket_url(endpoint, str(tmp_path), monkeypatch)
        writer = CatalogueLog(BucketStore(url))
        for number in range(ENTRIES // 2 - 2):
            writer.stage(other := candidate(f"adapter-{number}", "weights"))
            writer.promote(other)
        for revision in (OLD, NEW):
            writer.stage(revision)
            writer.promote(revision)
        operations.clear()
        yield url


async def replica_of(log: CatalogueLog, store: AdapterStore) -> tuple[Control, Reconciler]:
    """A replica that has followed the catalogue, and holds all revisions. It shares the log with what changes the
    catalogue, as a server's does."""
    engine = FakeEngine()
    reconciler = Reconciler("replica", log, engine, AdapterPool(engine, store, capacity=ENTRIES), verify_nothing)
    await reconciler.sync()
    return Control(log, OneReplica(reconciler)), reconciler


async def test_a_change_reads_nothing_that_its_process_knows(
    url: str, operations: list[str], store: AdapterStore
) -> None:
    control, reconciler = await replica_of(CatalogueLog(BucketStore(url)), store)
    assert reconciler.catalogue.epoch == ENTRIES

    async def cost(change: object) -> Counter[str]:
        operations.clear()
        await change  # type: ignore[misc]
        return Counter(operations)

    assert await cost(control.roll_back("pirate")) == {"list": 2, "read": 2, "write": 1}
    assert await cost(control.publish(NEXT)) == {"list": 2, "read": 2, "write": 2}
    operations.clear()
    control.log.read()  # as `status` does
    await control.replicas.sync()
    assert Counter(operations) == {"list": 1, "read": 1}


async def test_of_the_entries_of_other_processes_each_is_read_once(
    url: str, operations: list[str], store: AdapterStore
) -> None:
    control, reconciler = await replica_of(CatalogueLog(BucketStore(url)), store)
    other = CatalogueLog(BucketStore(url))
    for number in range(3):
        other.stage(candidate(f"late-{number}", "weights"))
    operations.clear()

    rolled_back = await control.roll_back("pirate")

    assert (rolled_back.epoch, rolled_back.revision) == (ENTRIES + 4, OLD.adapter.engine_name)
    assert Counter(operations) == {"list": 2, "read": 3 + 2, "write": 1}
    assert reconciler.catalogue == other.read() == CatalogueLog(BucketStore(url)).read()


def test_a_replica_that_starts_begins_with_the_newest_snapshot(url: str, operations: list[str]) -> None:
    catalogue = CatalogueLog(BucketStore(url)).follow(Catalogue())

    assert catalogue.epoch == ENTRIES
    since_snapshot = ENTRIES - SNAPSHOT_EVERY
    assert Counter(operations) == {"list": 2, "read": 1 + 1 + since_snapshot}, "the first entry, the snapshot, the rest"


def test_a_long_log_is_listed_from_where_it_is_asked_for(url: str) -> None:
    bucket = BucketStore(url)

    assert bucket.names("catalogue", after="0000000198.json") == ["0000000199.json", "0000000200.json"]
    assert len(bucket.names("catalogue")) == ENTRIES
    assert bucket.names("catalogue", after="0000000200.json") == []
