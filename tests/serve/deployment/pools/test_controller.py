"""The server's own process gives Ray Serve the pools of the catalogue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from serve.catalogue.entry import Audit
from serve.catalogue.log import CatalogueLog
from serve.catalogue.pool_changes import add_pool, remove_pool, sleep_pool, wake_pool
from serve.catalogue.storage.object_store import DirectoryStore
from serve.deployment.app import deploy_config
from serve.deployment.pools.controller import PoolController
from serve.settings import GatewaySettings, ServeSettings
from tests.serve.catalogue.test_pool_changes import GIVEN, TICKET


@pytest.fixture
def given(tmp_path: Path) -> list[ServeSettings]:
    gateway = GatewaySettings(admin_tokens={"admin": "0" * 64}, max_wait_s=7)
    return [ServeSettings(**GIVEN.model_dump(), gateway=gateway, state_dir=tmp_path, cpus_per_replica=2)]


def test_the_applications_that_run_keep_their_arguments_whatever_is_added(
    log: CatalogueLog, given: list[ServeSettings], tmp_path: Path
) -> None:
    """Ray Serve restarts the replicas of an application whose arguments have changed."""
    deployed: list[Sequence[ServeSettings]] = []
    controller = PoolController(given, log, deployed.append)
    second = replace(TICKET, name="second", base="d" * 64)
    admin = CatalogueLog(DirectoryStore(tmp_path))
    for change in (
        lambda: add_pool(admin, TICKET, [], Audit()),
        lambda: add_pool(admin, second, [], Audit()),
        lambda: remove_pool(admin, "ticket", [], Audit()),
    ):
        change()
        controller.update()
        controller.update()

    names = [[pool.engine.model_name for pool in pools] for pools in deployed]
    assert names == [["small", "ticket"], ["small", "ticket", "second"], ["small", "second"]], "each change once"
    arguments = [
        {application["name"]: application["args"] for application in deploy_config(pools)["applications"]}
        for pools in ([*given], *deployed)
    ]
    for before, after in pairwise(arguments):
        assert all(before[name] == after[name] for name in before.keys() & after.keys())
    added = deployed[0][1]
    assert (added.gateway.max_wait_s, added.added, added.route_prefix) == (7, True, "/pools/ticket")
    assert [pool.engine.model_name for pool in added.other_pools] == ["small"]
    assert added.cpus_per_replica == 0, "Ray has none to give that were not there at its start"


def test_a_pool_that_sleeps_is_stopped_and_one_that_wakes_is_started(
    log: CatalogueLog, given: list[ServeSettings], tmp_path: Path
) -> None:
    deployed: list[Sequence[ServeSettings]] = []
    controller = PoolController(given, log, deployed.append)
    admin = CatalogueLog(DirectoryStore(tmp_path))
    add_pool(admin, TICKET, [], Audit())
    controller.update()
    awake = admin.read().pools["ticket"]
    sleep_pool(admin, awake, Audit())
    sleep_pool(admin, awake, Audit())
    controller.update()
    wake_pool(admin, "ticket", Audit())
    wake_pool(admin, "ticket", Audit())
    controller.update()

    names = [[pool.engine.model_name for pool in pools] for pools in deployed]
    assert names == [["small", "ticket"], ["small"], ["small", "ticket"]]
    assert deploy_config(deployed[0]) == deploy_config(deployed[2]), "Ray Serve restarts what has other arguments"
    assert admin.read().epoch == 3, "what is so already is not recorded"
    sleep_pool(admin, awake, Audit())
    assert not admin.read().pools["ticket"].asleep, "whoever found it idle did so before it was woken"
    add_pool(admin, TICKET, [], Audit())
    assert admin.read().epoch == 3, "it is the same pool"
    assert sleep_pool(admin, replace(TICKET, name="gone"), Audit()).epoch == 3


def test_what_ray_serve_refused_is_tried_again(log: CatalogueLog, given: list[ServeSettings]) -> None:
    attempts: list[int] = []

    def deploy(pools: Sequence[ServeSettings]) -> None:
        attempts.append(len(pools))
        if len(attempts) == 1:
            raise RuntimeError("the controller is being restarted")

    controller = PoolController(given, log, deploy)
    add_pool(log, TICKET, [], Audit())
    with pytest.raises(RuntimeError):
        controller.update()
    controller.update()
    controller.update()

    assert attempts == [2, 2]
