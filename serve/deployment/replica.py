"""The Ray Serve deployment: one engine, one gateway, one copy of the catalogue."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray import serve as ray_serve

from serve import logs
from serve.admin import Admin
from serve.admission import Admission
from serve.config import ServeSettings
from serve.counted import CountedControl
from serve.engine import Engine
from serve.errors import ReplicaUnreachable
from serve.events import NOBODY, Events
from serve.exposition import Exposition
from serve.forward import Peers
from serve.gateway import Gateway
from serve.ledger import Ledgers
from serve.ledger_actor import ActorLedger
from serve.ledger_redis import RedisLedger
from serve.listening import on_listening
from serve.passage import Passages
from serve.probe import Prover
from serve.publish import most_pinned
from serve.reconcile import Reconciler, ReplicaReport
from serve.recorder import Recorder
from serve.residency import AdapterPool
from serve.rollout import Rollouts
from serve.sentinel import Sentinel
from serve.snapshot import Snapshot
from serve.state import StateDir
from serve.store import AdapterStore
from serve.tracing import tracer_of
from serve.usage import Meter
from serve.waiting import WaitLimits

DEPLOYMENT = "EngineReplica"
# Of ray.serve's ReplicaState: one that a restarted controller has not looked at yet goes on answering.
_SERVING_STATES = frozenset({"RUNNING", "UPDATING", "RECOVERING", "PENDING_MIGRATION"})
_HANDLE_LAG_S = 0.1
_ENGINE_LOOK_S = 0.1
# For the last event of the streams that the engine's death has broken off.
_LAST_EVENTS_S = 0.2
_LAST_WRITE_S = 1.0

logger = logging.getLogger(__name__)


@ray_serve.deployment(name=DEPLOYMENT)
@ray_serve.ingress()  # late-bound: the engine's application exists only after the engine does
class EngineReplica:
    """Ready only when it holds what the catalogue asks for; follows it by notification and by a slow poll."""

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        self._settings = ServeSettings.model_validate(settings)
        if not self._settings.gpus_per_replica:
            # On a CPU nothing is compiled while it runs: vLLM would begin with the first request for log-probabilities,
            # which takes seconds, and where there is no compiler that request would end the engine.
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        from serve.vllm_engine import VllmEngine  # seconds of import, needed in replicas only

        context = ray_serve.get_replica_context()
        replica = context.replica_id.unique_id
        await self._begin_telling(replica)
        self._engine = await VllmEngine.start(
            self._settings.engine, self._recorder.engine_finished, self._settings.tracing.endpoint
        )
        state = StateDir(self._settings.state_url or self._settings.state_dir, self._settings.state_dir)
        self._log, self._store = state.log, state.store
        self._ledgers = await ledgers_of(self._settings)
        self._meter = Meter(state.objects, self._settings.gateway.usage_flush_s)
        self._pool = pool_of(self._engine, self._store, self._settings, self._recorder)
        self._replicas = RayReplicas(context.app_name, self._settings.sync_timeout_s)
        self._admin = self._make_admin()
        self._rollouts = Rollouts(self._admin.give_up)
        self._peers = Peers(replica, node_address(), self._replicas.report)
        on_listening(replica, self._peers.listens_on)
        self._reconciler = Reconciler(
            replica,
            self._log,
            self._engine,
            self._pool,
            Prover(self._engine, self._store, self._settings.admission).prove,
            self._settings.keep_previous,
            address=lambda: self._peers.address,
            passed_on=lambda: self._peers.passed_on,
            splits=self._rollouts.summaries,
            events=self._recorder,
        )
        self._tell_of_parts()
        await self._reconciler.start()
        self._meter.start()
        self._snapshot.is_ready = True
        logger.info("the replica is ready", extra={"event": "replica ready", "epoch": self._reconciler.catalogue.epoch})
        self._following = asyncio.create_task(self._follow())
        self._watching = asyncio.create_task(self._watch_identity())
        self._outliving = asyncio.create_task(self._end_with_engine())

    async def __serve_build_asgi_app__(self) -> Gateway:
        passages = Passages(self._settings.gateway, self._engine, self._ledgers, self._meter)
        gateway = Gateway(
            self._settings,
            self._engine,
            self._pool,
            lambda: self._reconciler.catalogue,
            self._admin,
            self._rollouts,
            self._peers if self._settings.replicas > 1 else None,
            passages,
            self._recorder,
            self._tracer,
        )
        self._snapshot.places = passages.places
        if gateway.keys:
            self._snapshot.keys = gateway.keys.expiries
        return gateway

    async def _begin_telling(self, replica: str) -> None:
        """Logs, metrics and traces, before there is an engine: a replica that never gets ready is seen."""
        settings = self._settings
        logs.set_up(settings.log, replica)
        self._recorder = Recorder(settings.metrics.max_adapters)
        self._snapshot = Snapshot(settings, self._recorder)
        self._tracer = tracer_of(settings.tracing, replica)
        if settings.metrics.directory:
            self._exposition = Exposition(settings.metrics.directory, replica, self._snapshot)
            await self._exposition.start()

    def _tell_of_parts(self) -> None:
        snapshot = self._snapshot
        snapshot.engine, snapshot.pool, snapshot.reconciler = self._engine, self._pool, self._reconciler
        snapshot.rollouts, snapshot.forwarded = self._rollouts, lambda: self._peers.passed_on

    def _make_admin(self) -> Admin:
        settings = self._settings
        return Admin(
            settings.gateway.admin_tokens,
            settings.engine,
            settings.admission,
            Admission(settings.engine, settings.admission),
            self._store,
            CountedControl(
                self._log,
                self._replicas,
                settings.sync_timeout_s,
                most_pinned(settings.engine.adapter_capacity),
                self._recorder,
            ),
        )

    async def sync(self, awaited: str | None = None) -> dict[str, Any]:
        """Follow the catalogue now; the ReplicaReport as plain data."""
        report = await self._reconciler.sync(awaited)
        return report.model_dump()

    async def report(self) -> dict[str, Any]:
        """What it holds now, without following anything."""
        report = await self._reconciler.report()
        return report.model_dump()

    async def check_health(self) -> None:
        await self._engine.check_health()

    async def __del__(self) -> None:
        logger.info("the replica stops", extra={"event": "replica stops"})
        for name in ("_following", "_watching", "_outliving"):
            if task := getattr(self, name, None):
                task.cancel()
        if meter := getattr(self, "_meter", None):
            await asyncio.to_thread(meter.stop)
        if exposition := getattr(self, "_exposition", None):
            exposition.close()
        if tracer := getattr(self, "_tracer", None):
            await asyncio.to_thread(tracer.shutdown)
        if engine := getattr(self, "_engine", None):
            engine.shutdown(timeout_s=5)

    async def _follow(self) -> None:
        """Look at the catalogue, and now and then at the engine. An outage is told once, when it begins."""
        failing, audited = False, time.monotonic()
        while True:
            await asyncio.sleep(self._settings.catalogue_poll_s)
            try:
                await self._reconciler.follow()
                if time.monotonic() - audited > self._settings.drift_check_s:
                    audited = time.monotonic()
                    await self._reconciler.audit()
                failing = False
            except Exception:  # whatever it is, it may be over the next time
                self._recorder.follow_failed()
                if not failing:
                    logger.exception("could not follow the catalogue")
                failing = True

    async def _watch_identity(self) -> None:
        settings = self._settings
        tolerance_nats = settings.admission.golden_tolerance_nats
        sentinel = Sentinel(self._engine, self._pool, tolerance_nats, self._recorder)
        while period_s := settings.metrics.identity_check_s:
            await asyncio.sleep(period_s)
            try:
                await sentinel.look()
            except Exception:  # the engine's or the queue's trouble is told by those who have it
                logger.debug("could not look at an adapter", exc_info=True)

    async def _end_with_engine(self) -> None:
        """The process ends when its engine has died, and the proxy has another one answer what this one had not begun
        to. Waiting for a health check to find it would take seconds."""
        while not self._engine.is_dead:  # noqa: ASYNC110  (vLLM sets a flag and tells nobody)
            await asyncio.sleep(_ENGINE_LOOK_S)
        logger.error("the engine died, and this replica ends with it", extra={"event": "engine died"})
        await asyncio.sleep(_LAST_EVENTS_S)
        try:
            async with asyncio.timeout(_LAST_WRITE_S):
                await asyncio.to_thread(self._meter.stop)
            if self._settings.metrics.directory:
                self._exposition.leave_last_words()
        except Exception:
            logger.exception("not everything could be written down at the end")
        os._exit(1)


def node_address() -> str:
    """Where the other nodes reach this one. Not what ray.util tells: that is the machine's way to the internet, which
    need not be the address that Ray was started with."""
    own = ray.get_runtime_context().get_node_id()
    return next(str(node["NodeManagerAddress"]) for node in ray.nodes() if node["NodeID"] == own)


async def ledgers_of(settings: ServeSettings) -> Ledgers:
    """Where all replicas count what callers use."""
    gateway = settings.gateway
    if gateway.limits_url:
        return RedisLedger(gateway.limits_url, gateway.lease_s)
    ledger = ActorLedger(gateway.lease_s)
    if gateway.knows_callers:
        await ledger.prepare()
    return ledger


def pool_of(engine: Engine, store: AdapterStore, settings: ServeSettings, events: Events = NOBODY) -> AdapterPool:
    gateway = settings.gateway
    limits = WaitLimits(
        max_waiting=gateway.max_waiting_requests,
        max_waiting_per_caller=gateway.max_waiting_per_caller,
        max_wait_s=gateway.max_wait_s,
        turn_s=gateway.adapter_turn_s,
    )
    return AdapterPool(
        engine,
        store,
        settings.engine.adapter_capacity,
        slots=settings.engine.max_active_adapters,
        limits=limits,
        events=events,
    )


class RayReplicas:
    """serve.publish.Replicas through Ray Serve's broadcast."""

    def __init__(self, app_name: str, timeout_s: float) -> None:
        self._app_name = app_name
        self._handle = ray_serve.get_deployment_handle(DEPLOYMENT, app_name)
        self._timeout_s = timeout_s

    async def sync(self, awaited: str | None = None) -> Sequence[ReplicaReport]:
        """Broadcasts until every replica that the controller counts has answered: this handle learns of a new one a
        little later than the callers that it answers."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            reports, serving = await asyncio.gather(self._all("sync", awaited), self._serving())
            if len(reports) >= serving:
                return reports
            if time.monotonic() > deadline:
                raise ReplicaUnreachable(f"{serving} replicas serve, but only {len(reports)} could be asked.")
            await asyncio.sleep(_HANDLE_LAG_S)

    async def report(self) -> Sequence[ReplicaReport]:
        """What every one holds, as it is. Raises ReplicaUnreachable if one does not answer."""
        return await self._all("report")

    async def _all(self, method: str, *args: object) -> Sequence[ReplicaReport]:
        response = self._handle.broadcast(method, *args)
        try:
            reports = await response.results_async(timeout_s=self._timeout_s)
        except Exception as error:
            raise ReplicaUnreachable(f"A replica did not answer within {self._timeout_s} s: {error!r}.") from error
        return [ReplicaReport.model_validate(report) for report in reports]

    async def _serving(self) -> int:
        """How many replicas may be answering callers, as the controller knows it."""
        try:
            async with asyncio.timeout(self._timeout_s):
                status = await asyncio.to_thread(ray_serve.status)
        except Exception as error:
            raise ReplicaUnreachable(f"Ray Serve's controller did not tell of its replicas: {error!r}.") from error
        states = status.applications[self._app_name].deployments[DEPLOYMENT].replica_states
        return sum(count for state, count in states.items() if state in _SERVING_STATES)
