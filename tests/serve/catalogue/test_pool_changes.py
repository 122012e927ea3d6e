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
from serve.catalogue.pool_changes import add_pool, move_alias, pools_of, remove_pool
from serve.catalogue.split import Split
from serve.catalogue.storage.object_store import DirectoryStore
from serve.errors import TransitionRefused, UnknownModel
from serve.names import RequestedModel
from serve.settings import EngineSettings, GatewaySettings, PoolSettings, ServeSettings
from tests.serve.conftest import BASE, candidate

TICKET = AddedPool(name="ticket", base="c" * 64, model_path=Path("/models/ticket"), max_lora_rank=16)
SMALL = EngineSettings(
    model_path=Path("/models/small"),
    model_name="small",
    fingerprint=BASE,
    max_active_adapters=2,
    vllm_args=("--seed=1",),
)
GIVEN = PoolSettings(engine=SMALL)
TICKET_POOL = TICKET.settings(SMALL)
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
    renamed = replace(TICKET, name="given", base="f" * 64)
    catalogue = Catalogue(3, {}, {"ticket": TICKET, "given-again": again, "given": renamed})

    own, *others = pools_of(settings, catalogue)

    assert own == settings
    assert [pool.engine.model_name for pool in others] == ["given", "ticket"], "what was given to `run` counts"
    assert others[1].added
    assert (others[1].application, others[1].route_prefix) == ("graft-ticket", "/pools/ticket")
    assert (others[1].engine.vllm_args, others[1].engine.max_active_adapters) == (("--seed=1",), 2), "as all pools here"


@pytest.fixture
def moved(log: CatalogueLog) -> CatalogueLog:
    """`pirate`, second revision, whose name points to the pool `ticket`."""
    add_pool(log, TICKET, [GIVEN], ANN)
    for content in ("one", "two"):
        log.stage(candidate("pirate", content))
        log.promote(candidate("pirate", content))
    move_alias(log, "pirate", TICKET_POOL, ANN)
    return log


def test_a_moved_name_points_to_the_pool_and_its_revisions_stay_reachable_and_loaded(moved: CatalogueLog) -> None:
    catalogue, second = moved.read(), candidate("pirate", "two").adapter

    assert catalogue.pool_of_name(RequestedModel("pirate")) == "ticket"
    assert catalogue.pool_of_name(RequestedModel("pirate", second.revision)) is None
    assert catalogue.resolve(RequestedModel("pirate", second.revision)) == second
    assert second in catalogue.needed(keep_previous=0)
    assert move_alias(moved, "pirate", TICKET_POOL, ANN).epoch == catalogue.epoch, "once is enough"


def test_a_rollback_from_a_pool_is_one_entry_and_leads_to_the_revision_of_before(moved: CatalogueLog) -> None:
    before, second = moved.read(), candidate("pirate", "two")

    after = moved.roll_back(second, ANN)

    assert (after.epoch, after.pool_of_name(RequestedModel("pirate"))) == (before.epoch + 1, None)
    assert after.resolve(RequestedModel("pirate")) == second.adapter
    assert (
        moved.roll_back(candidate("pirate", "one")).resolve(RequestedModel("pirate"))
        == candidate("pirate", "one").adapter
    )


def test_a_publish_moves_the_name_back_to_an_adapter_and_a_retire_ends_it(moved: CatalogueLog) -> None:
    third = candidate("pirate", "three")
    moved.stage(third)
    assert moved.promote(third).pool_of_name(RequestedModel("pirate")) is None

    move_alias(moved, "pirate", TICKET_POOL, ANN)
    assert moved.retire("pirate").pool_of_name(RequestedModel("pirate")) is None
    assert remove_pool(moved, "ticket", [GIVEN], ANN).pools == {}


def test_a_move_ends_a_canary(moved: CatalogueLog) -> None:
    third = candidate("pirate", "three")
    moved.roll_back(candidate("pirate", "two"))
    moved.stage(third)
    moved.split(third, Split(kind="canary", revision=third.revision))

    catalogue = move_alias(moved, "pirate", TICKET_POOL, ANN)

    assert catalogue.split_of("pirate") is None
    assert third.adapter not in catalogue.staged


def test_a_pool_that_answers_for_a_name_is_not_removed(moved: CatalogueLog) -> None:
    with pytest.raises(TransitionRefused, match="ticket answers for pirate: roll back first"):
        remove_pool(moved, "ticket", [GIVEN], ANN)


def test_no_name_is_moved_to_its_own_base_model_or_to_a_pool_that_is_gone(log: CatalogueLog) -> None:
    log.stage(candidate("pirate", "one"))
    with pytest.raises(UnknownModel):
        move_alias(log, "pirate", TICKET_POOL, ANN)
    log.promote(candidate("pirate", "one"))

    with pytest.raises(TransitionRefused, match="small is the base model of pirate"):
        move_alias(log, "pirate", GIVEN, ANN)
    with pytest.raises(TransitionRefused, match="ticket was removed meanwhile"):
        move_alias(log, "pirate", TICKET_POOL, ANN)


def test_a_snapshot_keeps_where_a_name_points(moved: CatalogueLog, tmp_path: Path) -> None:
    while moved.read().epoch < SNAPSHOT_EVERY:
        moved.stage(candidate("other", str(moved.read().epoch)))
    for entry in (tmp_path / "catalogue").iterdir():
        if int(entry.stem) < SNAPSHOT_EVERY:
            entry.unlink()

    assert CatalogueLog(DirectoryStore(tmp_path)).read() == moved.read()


def test_entries_that_have_nothing_to_do_with_pools_say_nothing_of_them(log: CatalogueLog, tmp_path: Path) -> None:
    """An older server refuses an entry with a field that it does not know."""
    log.stage(candidate("pirate", "one"))

    assert "pool" not in json.loads((tmp_path / "catalogue" / "0000000001.json").read_bytes())


def test_the_record_of_a_pool_that_is_given_to_run_now_can_be_removed(log: CatalogueLog) -> None:
    add_pool(log, TICKET, [], ANN)
    log.stage(of_ticket())
    same_model = PoolSettings(engine=TICKET_POOL.engine.model_copy(update={"model_name": "other"}))
    same_name = PoolSettings(engine=TICKET_POOL.engine.model_copy(update={"fingerprint": "d" * 64}))

    for given in (same_model, same_name):
        assert remove_pool(log, "ticket", [given], ANN).pools == {}
        add_pool(log, TICKET, [], ANN)


def test_no_adapter_is_staged_for_a_base_model_whose_pool_was_removed(log: CatalogueLog) -> None:
    """The replica that admitted it may not have followed the removal."""
    with pytest.raises(TransitionRefused, match="was removed meanwhile"):
        log.stage(of_ticket(), given_bases={BASE})
    add_pool(log, TICKET, [GIVEN], ANN)

    assert log.stage(of_ticket(), given_bases={BASE}).staged
