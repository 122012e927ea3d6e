"""Pools in the catalogue: what may be added and removed, and what a reader finds later."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from serve.catalogue.added_pool import AddedPool
from serve.catalogue.candidate import Candidate
from serve.catalogue.catalogue import Catalogue
from serve.catalogue.entry import Audit, PoolEntry
from serve.catalogue.log import SNAPSHOT_EVERY, CatalogueLog
from serve.catalogue.pool_changes import add_pool, pools_of, remove_pool
from serve.catalogue.storage.object_store import DirectoryStore
from serve.errors import TransitionRefused, UnknownModel
from serve.settings import EngineSettings, GatewaySettings, PoolSettings, ServeSettings
from tests.serve.conftest import BASE, candidate

ROOM = {"max_lora_rank": 16, "max_active_adapters": 2, "max_resident_adapters": 4}
TICKET = AddedPool(name="ticket", base="c" * 64, model_path=Path("/models/ticket"), vllm_args=("--seed=1",), **ROOM)
GIVEN = PoolSettings(engine=EngineSettings(model_path=Path("/models/small"), model_name="small", fingerprint=BASE))
ANN = Audit("ann", "for the help desk")


def of_ticket(name: str = "pirate") -> Candidate:
    return replace(candidate(name, "weights"), base=TICKET.base)


def test_an_added_pool_is_there_for_every_reader_until_it_is_removed(log: CatalogueLog, tmp_path: Path) -> None:
    add_pool(log, TICKET, [GIVEN], ANN)
    other = CatalogueLog(DirectoryStore(tmp_path))

    assert other.read().pools == {"ticket": TICKET}
    (number, entry), *_ = other.history()
    assert isinstance(entry, PoolEntry)
    assert (number, entry.verb, entry.pool, entry.by, entry.reason) == (1, "add_pool", TICKET, "ann", ANN.reason)
    assert remove_pool(other, "ticket", [GIVEN], ANN).pools == {}
    assert log.read().pools == {}


def test_adding_the_same_pool_again_changes_nothing(log: CatalogueLog) -> None:
    first = add_pool(log, TICKET, [GIVEN], ANN)

    assert add_pool(log, TICKET, [GIVEN], ANN).epoch == first.epoch


def test_two_admins_who_add_one_pool_at_once_add_it_once(tmp_path: Path) -> None:
    def add() -> None:
        add_pool(CatalogueLog(DirectoryStore(tmp_path)), TICKET, [GIVEN], ANN)

    admins = [threading.Thread(target=add) for _ in range(8)]
    for admin in admins:
        admin.start()
    for admin in admins:
        admin.join()

    assert CatalogueLog(DirectoryStore(tmp_path)).read().epoch == 1


@pytest.mark.parametrize(
    ("pool", "reason"),
    [
        (replace(TICKET, name="other"), "served here already, as ticket"),
        (replace(TICKET, base="d" * 64), "The name ticket is taken"),
        (replace(TICKET, replicas=2), "remove it first to change it"),
        (replace(TICKET, base=BASE, name="other"), "served here already, as small"),
        (replace(TICKET, base="d" * 64, name="small"), "The name small is taken"),
        (replace(TICKET, base="d" * 64, name="pirate"), "The name pirate is taken"),
    ],
    ids=["model", "name", "other replicas", "model of the start", "name of the start", "name of an adapter"],
)
def test_a_name_or_model_that_is_served_already_is_not_added(log: CatalogueLog, pool: AddedPool, reason: str) -> None:
    log.stage(candidate("pirate", "weights"))
    before = add_pool(log, TICKET, [GIVEN], ANN)

    with pytest.raises(TransitionRefused, match=reason):
        add_pool(log, pool, [GIVEN], ANN)

    assert log.read() == before


def test_no_adapter_is_published_under_the_name_of_an_added_pool(log: CatalogueLog) -> None:
    add_pool(log, TICKET, [GIVEN], ANN)

    with pytest.raises(TransitionRefused, match="ticket is a base model here"):
        log.stage(candidate("ticket", "weights"))


def test_a_pool_is_removed_only_when_no_adapter_needs_it(log: CatalogueLog) -> None:
    add_pool(log, TICKET, [GIVEN], ANN)
    log.stage(of_ticket())

    with pytest.raises(TransitionRefused, match="ticket is the base model of pirate: retire them first"):
        remove_pool(log, "ticket", [GIVEN], ANN)
    with pytest.raises(TransitionRefused, match="small was given to `run`"):
        remove_pool(log, "small", [GIVEN], ANN)
    with pytest.raises(UnknownModel):
        remove_pool(log, "unknown", [GIVEN], ANN)
    log.retire("pirate")
    assert remove_pool(log, "ticket", [GIVEN], ANN).pools == {}


def test_a_snapshot_holds_the_added_pools_and_names_none_where_there_are_none(tmp_path: Path) -> None:
    log = CatalogueLog(DirectoryStore(tmp_path))
    for number in range(SNAPSHOT_EVERY):
        log.stage(candidate(f"adapter-{number}", "weights"))
    add_pool(log, TICKET, [GIVEN], ANN)
    for number in range(SNAPSHOT_EVERY):
        log.abandon(candidate(f"adapter-{number}", "weights"), ANN)

    first, second = (json.loads(path.read_bytes()) for path in sorted((tmp_path / "snapshots").iterdir()))
    assert "pools" not in first, "a server that knows no added pools can read it"
    assert list(second["pools"]) == ["ticket"]
    for entry in list((tmp_path / "catalogue").iterdir())[: SNAPSHOT_EVERY // 2]:
        if int(entry.stem) <= second["epoch"] - 1:
            entry.unlink()
    assert CatalogueLog(DirectoryStore(tmp_path)).read().pools == {"ticket": TICKET}


def test_the_pools_of_a_server_are_its_own_those_of_its_start_and_the_added_ones(tmp_path: Path) -> None:
    given = PoolSettings(engine=GIVEN.engine.model_copy(update={"model_name": "given", "fingerprint": "e" * 64}))
    settings = ServeSettings(
        **GIVEN.model_dump(),
        gateway=GatewaySettings(admin_tokens={"admin": "0" * 64}),
        state_dir=tmp_path,
        other_pools=(given,),
    )
    again = replace(TICKET, name="given-again", base="e" * 64)
    catalogue = Catalogue(2, {}, {"ticket": TICKET, "given-again": again})

    own, *others = pools_of(settings, catalogue)

    assert own == settings
    assert [pool.engine.model_name for pool in others] == ["given", "ticket"], "what was given to `run` counts"
    assert others[1].added
    assert (others[1].application, others[1].route_prefix) == ("graft-ticket", "/pools/ticket")
    assert others[1].engine.vllm_args == ("--seed=1",)
