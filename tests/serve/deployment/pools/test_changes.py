"""What a server finds out about an artifact before it records a pool, and how it shows one."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from serve.adapters.reconcile import ReplicaReport
from serve.admin.pool_routes import NewPool
from serve.catalogue.added_pool import AddedPool
from serve.catalogue.entry import Audit
from serve.catalogue.log import CatalogueLog
from serve.catalogue.pool_changes import add_pool, pools_of, sleep_pool
from serve.deployment.pools import changes
from serve.deployment.pools.changes import PoolChanges
from serve.deployment.pools.controller import settings_of_added
from serve.deployment.pools.sleep import sleep_when_idle
from serve.errors import EngineRefused, PathRefused, PoolAsleep, PoolRefused, PoolUnavailable, ServeError
from serve.observability.open_requests import OpenRequests
from serve.settings import AdmissionSettings, EngineSettings, GatewaySettings, PoolOptions, ServeSettings
from tests.serve.conftest import BASE, MakeArtifact
from tests.serve.guarded import until

ANN = Audit("ann")
NOBODY: Any = None  # in place of the replicas, whom only a move asks


def taken(settings: EngineSettings) -> None:
    """In place of vLLM, which takes all arguments."""


def settings_in(root: Path, **others: Any) -> ServeSettings:
    engine = EngineSettings(
        model_path=root, model_name="small", fingerprint=BASE, max_active_adapters=3, vllm_args=("--seed=1",)
    )
    defaults = {"takes_pools": True, "admission": AdmissionSettings(artifact_roots=(root,))}
    gateway = GatewaySettings(admin_tokens={"admin": "0" * 64})
    return ServeSettings(engine=engine, gateway=gateway, state_dir=root, **defaults | others)


@pytest.fixture
def applications(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Ray Serve's, by name. Ray itself does not run here."""
    known: dict[str, Any] = {}
    monkeypatch.setattr(changes.ray_serve, "status", lambda: SimpleNamespace(applications=known))
    return known


def application(status: str, message: str = "", ready: int = 0) -> Any:
    deployment = SimpleNamespace(message=message, replica_states={"RUNNING": ready})
    return SimpleNamespace(status=status, message="", deployments={"EngineReplica": deployment})


async def test_a_pool_runs_with_what_its_artifact_needs_and_with_the_options_of_the_server(
    log: CatalogueLog, make_artifact: MakeArtifact, tmp_path: Path, applications: dict[str, Any]
) -> None:
    artifact = make_artifact("pirate", rank=20, base="other base")
    pools = PoolChanges(settings_in(tmp_path), log, NOBODY, taken)

    view = await pools.add(NewPool(path=artifact.root, name="other", replicas=2), ANN)

    added = log.read().pools["other"]
    assert added.model_path == artifact.model_path
    assert added.base == artifact.manifest.model.fingerprint
    assert added.max_lora_rank == 32
    assert (view.name, view.state, view.replicas, view.ready, view.added) == ("other", "starting", 2, 0, True)
    again = await pools.add(NewPool(path=artifact.root, name="other", replicas=2), ANN)
    assert (again, log.read().epoch) == (view, 1), "a call that is repeated changes nothing"
    shown = {pool.name: (pool.added, pool.kind) for pool in await pools.all()}
    assert shown == {"other": (True, "base model"), "small": (False, "base model")}


async def test_the_state_of_a_pool_is_that_of_its_application_with_the_reason_of_a_failure(
    log: CatalogueLog, make_artifact: MakeArtifact, tmp_path: Path, applications: dict[str, Any]
) -> None:
    pools = PoolChanges(settings_in(tmp_path), log, NOBODY, taken)
    artifact = make_artifact("merged", name="merged", weights=None, base="merged weights")
    await pools.add(NewPool(path=artifact.root), ANN)

    async def seen() -> tuple[str, int, str]:
        view = next(pool for pool in await pools.all() if pool.name == "merged")
        return view.state, view.ready, view.reason

    failure = "Traceback (most recent call last):\n  …\nserve.errors.start.EngineStartFailed: no memory\n"
    for status, message, ready, expected in (
        ("DEPLOYING", "more than 30s to initialize. This may be caused by a slow __init__.", 0, ("starting", 0, "")),
        ("DEPLOYING", failure, 0, ("starting", 0, "no memory")),
        ("DEPLOY_FAILED", failure, 0, ("failed", 0, "no memory")),
        ("RUNNING", "", 1, ("running", 1, "")),
        ("DELETING", "", 1, ("stopping", 1, "")),
    ):
        applications["graft-merged"] = application(status, message, ready)
        assert await seen() == expected


async def test_nothing_is_recorded_for_a_model_that_the_machine_has_no_room_for(
    log: CatalogueLog,
    make_artifact: MakeArtifact,
    tmp_path: Path,
    applications: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    artifact = make_artifact("merged", name="merged", weights=None, base="merged weights")
    size = sum(file.stat().st_size for file in artifact.root.rglob("*.safetensors"))
    monkeypatch.setattr(changes, "memory_left", lambda: SimpleNamespace(available=2 * size - 1))
    pools = PoolChanges(settings_in(tmp_path), log, NOBODY, taken)

    with pytest.raises(PoolRefused, match=r"weights of all engines need .* are available"):
        await pools.add(NewPool(path=artifact.root, replicas=2), ANN)
    monkeypatch.setattr(changes.ray, "available_resources", lambda: {"GPU": 1.0})
    with_gpus = PoolChanges(settings_in(tmp_path, gpus_per_replica=1), log, NOBODY, taken)
    with pytest.raises(PoolRefused, match="need 2 GPUs, and 1 are free"):
        await with_gpus.add(NewPool(path=artifact.root, replicas=2), ANN)

    assert log.read().epoch == 0


async def test_memory_that_a_pool_which_starts_will_take_is_not_promised_to_another_one(
    log: CatalogueLog,
    make_artifact: MakeArtifact,
    tmp_path: Path,
    applications: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = make_artifact("first", name="first", weights=None, base="first weights")
    second = make_artifact("second", name="second", weights=None, base="other weights")
    size = sum(file.stat().st_size for file in first.root.rglob("*.safetensors"))
    monkeypatch.setattr(changes, "memory_left", lambda: SimpleNamespace(available=size + 8))
    pools = PoolChanges(settings_in(tmp_path), log, NOBODY, taken)

    await pools.add(NewPool(path=first.root), ANN)
    assert (await pools.add(NewPool(path=first.root), ANN)).name == "first", "it is there, and needs no more"
    with pytest.raises(PoolRefused, match="are available"):
        await pools.add(NewPool(path=second.root), ANN)
    applications["graft-first"] = application("RUNNING", ready=1)
    assert (await pools.add(NewPool(path=second.root), ANN)).name == "second"


async def test_a_path_out_of_the_roots_a_broken_artifact_and_a_server_with_fixed_pools_are_refused(
    log: CatalogueLog, make_artifact: MakeArtifact, tmp_path: Path
) -> None:
    artifact = make_artifact("merged", name="merged", weights=None, base="merged weights")
    adapter_alone = make_artifact("alone", name="alone", holds_base=False)
    with_link = make_artifact("link", name="link", weights=None, base="linked weights")
    assert with_link.model_path
    weights = next(with_link.model_path.glob("*.safetensors"))
    shutil.move(weights, tmp_path / "weights")
    weights.symlink_to(tmp_path / "weights")
    linked = tmp_path / "inside" / "linked"
    linked.parent.mkdir()
    linked.symlink_to(artifact.root)
    refused: list[tuple[dict[str, Any], Path, type[ServeError], str]] = [
        ({"takes_pools": False}, artifact.root, PoolRefused, "no process of its own starts others"),
        ({"admission": AdmissionSettings()}, artifact.root, PathRefused, "--artifact-root"),
        ({"admission": AdmissionSettings(artifact_roots=(linked.parent,))}, linked, PathRefused, "not below"),
        ({}, with_link.root, PathRefused, "is a symbolic link"),
        ({}, adapter_alone.root, PoolRefused, "None of the artifacts holds the base model"),
        ({}, tmp_path, PoolRefused, "manifest.json"),
    ]
    for others, path, kind, reason in refused:
        with pytest.raises(kind, match=reason):
            await PoolChanges(settings_in(tmp_path, **others), log, NOBODY, taken).add(NewPool(path=path), ANN)
    with pytest.raises(PoolRefused):
        await PoolChanges(settings_in(tmp_path, takes_pools=False), log, NOBODY, taken).remove("merged", ANN)

    assert log.read().epoch == 0


async def test_a_pool_has_its_own_settings_of_the_engine_and_the_servers_where_it_gives_none(
    log: CatalogueLog, make_artifact: MakeArtifact, tmp_path: Path, applications: dict[str, Any]
) -> None:
    artifact, settings = make_artifact("pirate", base="other base"), settings_in(tmp_path)
    body = {"path": artifact.root, "name": "other", "max_resident_adapters": 40, "vllm_args": ["--max-model-len=64"]}

    view = await PoolChanges(settings, log, NOBODY, taken).add(NewPool.model_validate(body), ANN)

    _, other = pools_of(settings, log.read())
    assert (other.engine.max_active_adapters, other.engine.max_resident_adapters) == (3, 40)
    assert other.engine.vllm_args == ("--seed=1", "--max-model-len=64"), "vLLM takes the last of repeated arguments"
    assert (view.max_active_adapters, view.max_resident_adapters) == (3, 40)
    assert view.vllm_args == ("--max-model-len=64",)
    seen_by_itself = settings_of_added(other, [settings])
    assert pools_of(seen_by_itself, log.read())[0].engine == other.engine
    third = make_artifact("third", name="third", base="third base")
    await PoolChanges(seen_by_itself, log, NOBODY, taken).add(NewPool(path=third.root), ANN)
    assert pools_of(seen_by_itself, log.read())[-1].engine.vllm_args == ("--seed=1",), "of the server, not of `other`"


async def test_arguments_that_vllm_refuses_are_told_before_the_pool_is_recorded(
    log: CatalogueLog, make_artifact: MakeArtifact, tmp_path: Path, applications: dict[str, Any]
) -> None:
    artifact = make_artifact("pirate", base="other base")

    def refuse(settings: EngineSettings) -> None:
        raise EngineRefused(f"vLLM refuses its arguments: {settings.vllm_args[-1]}")

    with pytest.raises(PoolRefused, match="vLLM refuses its arguments: --max-model-len=x"):
        await PoolChanges(settings_in(tmp_path), log, NOBODY, refuse).add(
            NewPool(path=artifact.root, vllm_args=("--max-model-len=x",)), ANN
        )
    with pytest.raises(ValidationError, match="--trust-remote-code can't be set for one pool"):
        NewPool(path=artifact.root, vllm_args=("--trust_remote_code",))
    for harmful in ("--worker-cls=a.b", "--reasoning-parser-plugin=/x.py", "--speculative-config.model=/x", "x"):
        with pytest.raises(ValidationError, match="can't be set for one pool"):
            NewPool(path=artifact.root, vllm_args=(harmful,))

    assert log.read().epoch == 0


async def test_a_sleeping_pool_is_woken_where_the_machine_has_room_for_it(
    log: CatalogueLog,
    make_artifact: MakeArtifact,
    tmp_path: Path,
    applications: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    artifact = make_artifact("merged", name="merged", weights=None, base="merged weights")
    pools = PoolChanges(settings_in(tmp_path), log, NOBODY, taken)
    await pools.add(NewPool(path=artifact.root, sleep_after_s=60), ANN)
    sleep_pool(log, log.read().pools["merged"], ANN)
    assert [(view.state, view.sleep_after_s) for view in await pools.all()] == [("asleep", 60), ("starting", None)]

    monkeypatch.setattr(changes, "memory_left", lambda: SimpleNamespace(available=1))
    with pytest.raises(PoolAsleep, match="merged was asleep, and it can't start now: The weights of all engines need"):
        await pools.wake("merged")
    assert log.read().pools["merged"].asleep
    applications["graft-merged"] = application("DELETING", ready=1)
    woken_at = await pools.wake("merged")  # what its own engines still hold is not missing
    applications.clear()
    again = await pools.wake("merged")

    assert again == woken_at == log.read().pools["merged"].woken_at
    assert [view.state for view in await pools.all()] == ["starting", "starting"]
    await pools.give_up("merged")
    assert not log.read().pools["merged"].asleep, "it starts"
    failure = "Traceback (most recent call last):\n  …\nserve.errors.start.EngineStartFailed: no memory\n"
    applications["graft-merged"] = application("DEPLOY_FAILED", failure)
    await pools.give_up("merged")
    assert log.read().pools["merged"].asleep, "the next request tries it again"
    assert dict(log.history())[4].reason == "its engines did not start: no memory"
    with pytest.raises(PoolUnavailable):
        await pools.wake("gone")
    with pytest.raises(PoolUnavailable):
        await PoolChanges(settings_in(tmp_path, takes_pools=False), log, NOBODY, taken).wake("merged")


async def test_a_pool_sleeps_once_none_of_its_replicas_has_had_a_request_for_long_enough(
    log: CatalogueLog, tmp_path: Path
) -> None:
    options = PoolOptions(sleep_after_s=5)
    pool = AddedPool(name="merged", base=BASE, model_path=tmp_path, max_lora_rank=0, options=options)
    add_pool(log, pool, [], ANN)
    requests, other_is_idle_s = OpenRequests(), 0.0

    async def reports() -> list[ReplicaReport]:
        idle = (requests.idle_s, other_is_idle_s)
        return [
            ReplicaReport(replica=str(each), epoch=1, resident=(), running_requests=0, failures={}, idle_s=each)
            for each in idle
        ]

    settings = pool.settings(settings_in(tmp_path).engine).model_copy(update={"sleep_after_s": 1})
    task = asyncio.create_task(sleep_when_idle(settings, log, log.read, requests, reports))
    with requests.counted():
        other_is_idle_s = 60.0
        await asyncio.sleep(2)
        assert not log.read().pools["merged"].asleep, "this one answers"
    other_is_idle_s = 0.0
    await asyncio.sleep(2)
    assert not log.read().pools["merged"].asleep, "the other one answers"
    other_is_idle_s = 60.0
    await until(lambda: log.read().pools["merged"].asleep)
    task.cancel()

    entry = dict(log.history())[2]
    assert (entry.verb, entry.by, entry.reason) == ("sleep_pool", "graft", "no request for 1 s")
