"""The Ray Serve deployment: one engine, one gateway, one copy of the catalogue."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import TYPE_CHECKING, Any

from ray import serve as ray_serve

from serve.adapters.admission import Admission
from serve.adapters.change_events import ReportingControl
from serve.adapters.identity_check import IdentityChecker
from serve.adapters.pool import AdapterPool
from serve.adapters.publish import max_pinned
from serve.adapters.reconcile import Reconciler
from serve.adapters.rollout import Rollouts
from serve.adapters.slot_scheduler import WaitLimits
from serve.adapters.verification import RevisionVerifier
from serve.admin.pool_routes import PoolRoutes
from serve.admin.routes import Admin
from serve.callers.usage import Meter
from serve.catalogue.adapter_store import AdapterStore
from serve.catalogue.catalogue import Catalogue
from serve.catalogue.pool_changes import given_bases, pools_of
from serve.catalogue.state_dir import StateDir
from serve.deployment.metrics_collector import MetricsCollector
from serve.deployment.metrics_socket import MetricsSocket
from serve.deployment.pools.changes import PoolChanges
from serve.deployment.pools.connections import PoolConnections
from serve.deployment.pools.room import check_model
from serve.deployment.pools.sleep import sleep_when_idle
from serve.deployment.proxy.uvicorn_patches import patch_uvicorn_startup
from serve.deployment.ray_patches import keep_replica_on, node_address
from serve.deployment.ray_replicas import DEPLOYMENT, ServerReplicas
from serve.deployment.shared_limits import rate_limit_backend_of
from serve.engine.protocol import Engine
from serve.gateway.app import Gateway
from serve.gateway.request_policy import RequestPolicy
from serve.gateway.routing.other_pools import OtherPools
from serve.gateway.routing.peers import Peers
from serve.gateway.routing.wake_queue import WakeQueue
from serve.observability import logs
from serve.observability.events import NO_EVENTS, Events
from serve.observability.open_requests import OpenRequests
from serve.observability.recorder import MetricsRecorder
from serve.observability.tracing import tracer_of
from serve.settings import ServeSettings

if TYPE_CHECKING:
    from serve.engine.vllm_engine import VllmEngine

_ENGINE_POLL_S = 0.1
# Of the time after which a publish gives up on a replica: the replica itself can say what it waits for.
_OWN_SHARE_OF_TIMEOUT = 0.9
# Time to send the last event of the streams that the death of the engine has ended.
_LAST_EVENTS_S = 0.2
_LAST_WRITE_S = 1.0

logger = logging.getLogger(__name__)


@ray_serve.deployment(name=DEPLOYMENT)
@ray_serve.ingress()  # late-bound: the engine's application exists only after the engine does
class EngineReplica:
    """One engine and its gateway. Ready once the engine holds the adapters that the catalogue asks for; follows the
    catalogue by notification and by a slow poll."""

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        self._settings = ServeSettings.model_validate(settings)
        engine_class = import_engine(self._settings)
        context = ray_serve.get_replica_context()
        self._replica, self._open_requests = context.replica_id.unique_id, OpenRequests()
        await self._start_observability()
        self._engine = await engine_class.start(
            self._settings.engine, self._recorder.engine_finished, self._settings.tracing.endpoint
        )
        await self._open_state()
        address = node_address()
        keep_replica_on(address)
        self._connections = PoolConnections(self._settings, context.app_name, address, self._current)
        self._admin = self._new_admin(ServerReplicas(self._connections.replicas))
        self._rollouts = Rollouts(self._admin.give_up)
        is_alone, reports = self._settings.replicas == 1, self._connections.own.report
        self._peers = Peers(self._replica, address, reports, self._catch_up, is_alone)
        patch_uvicorn_startup(self._replica, self._peers.listens_on)
        self._reconciler = self._new_reconciler()
        self._collect_all_metrics()
        await self._reconciler.start()
        self._meter.start()
        self._report_ready()
        sleeping = sleep_when_idle(self._settings, self._log, self._current, self._open_requests, reports)
        tasks = (self._follow(), self._watch_identity(), self._metrics.watch_disk(), self._end_with_engine(), sleeping)
        self._tasks = [asyncio.create_task(task) for task in tasks]

    async def __serve_build_asgi_app__(self) -> Gateway:
        limits, forwarder = self._settings.gateway, self._peers.forwarder
        policy = RequestPolicy(limits, self._engine, self._rate_limits, self._meter, self._open_requests)
        changes = PoolChanges(self._settings, self._log, self._admin.control.replicas)
        wakes = WakeQueue(changes, limits.max_waiting_requests, limits.max_wake_s)
        gateway = Gateway(
            self._settings,
            self._engine,
            self._pool,
            self._current,
            self._admin,
            self._rollouts,
            self._peers,
            policy,
            self._recorder,
            self._tracer,
            OtherPools(self._settings, self._current, lambda pool: self._connections.to_pool(pool, forwarder, wakes)),
            PoolRoutes(self._admin, changes).routes(),
        )
        self._metrics.engine_queue, self._metrics.bodies = policy.engine_queue, policy.bodies
        if gateway.keys:
            self._metrics.keys = gateway.keys.expiries
        if gateway.issuer:
            self._metrics.issuer_keys = gateway.issuer.keys
            self._tasks.append(asyncio.create_task(gateway.issuer.keys.keep_fresh()))
        return gateway

    async def _start_observability(self) -> None:
        """Start logs, metrics and traces before the engine, so that a replica that never becomes ready is observed."""
        settings = self._settings
        logs.set_up(settings.log, self._replica)
        self._recorder = MetricsRecorder(settings.metrics.max_adapters)
        self._metrics = MetricsCollector(settings, self._recorder)
        self._tracer = tracer_of(settings.tracing, self._replica)
        if settings.metrics.directory:
            self._metrics_socket = MetricsSocket(settings.metrics.directory, self._replica, self._metrics)
            await self._metrics_socket.start()

    async def _open_state(self) -> None:
        """Open the catalogue, the adapters of the state directory, and the usage of callers."""
        settings = self._settings
        state = StateDir.of_server(settings)
        self._log, self._store = state.log, state.store
        self._rate_limits = await rate_limit_backend_of(settings)
        self._meter = Meter(state.objects, settings.gateway.usage_flush_s)
        self._pool = pool_of(self._engine, self._store, settings, self._recorder)

    def _new_admin(self, replicas: ServerReplicas) -> Admin:
        settings = self._settings
        control = ReportingControl(
            self._log,
            replicas,
            settings.sync_timeout_s,
            max_pinned(settings.engine.adapter_capacity),
            given_bases(settings),
            self._recorder,
        )
        return Admin(
            settings.gateway.admin_tokens,
            settings.admission,
            Admission(lambda: [pool.engine for pool in pools_of(settings, self._current())], settings.admission),
            self._store,
            control,
        )

    def _current(self) -> Catalogue:
        """The copy of the catalogue by which requests are resolved."""
        return self._reconciler.catalogue

    async def _catch_up(self) -> None:
        await self._reconciler.follow()

    def _new_reconciler(self) -> Reconciler:
        return Reconciler(
            self._replica,
            self._log,
            self._engine,
            self._pool,
            RevisionVerifier(self._engine, self._store, self._settings.admission).verify,
            self._settings.keep_previous,
            self._settings.engine.fingerprint,
            self._settings.engine.model_name,
            address=lambda: self._peers.address,
            forwarded=lambda: self._peers.forwarded,
            splits=self._rollouts.summaries,
            idle_s=lambda: self._open_requests.idle_s,
            events=self._recorder,
            need_files=self._store.want,
        )

    def _collect_all_metrics(self) -> None:
        """From now on the metrics also show the engine and what follows the catalogue."""
        metrics = self._metrics
        metrics.engine, metrics.pool, metrics.reconciler = self._engine, self._pool, self._reconciler
        metrics.rollouts, metrics.forwarded = self._rollouts, lambda: self._peers.forwarded

    def _report_ready(self) -> None:
        self._metrics.is_ready = True
        self._open_requests.begin()
        logger.info("the replica is ready", extra={"event": "replica ready", "epoch": self._reconciler.catalogue.epoch})

    async def sync(self, awaited: str | None = None) -> dict[str, Any]:
        """Follow the catalogue, then return the ReplicaReport as plain data, in time for the caller's timeout."""
        report = await self._reconciler.sync(awaited, _OWN_SHARE_OF_TIMEOUT * self._settings.sync_timeout_s)
        return report.model_dump()

    async def report(self) -> dict[str, Any]:
        """The ReplicaReport as plain data, without following the catalogue first."""
        report = await self._reconciler.report()
        return report.model_dump()

    async def check_health(self) -> None:
        await self._engine.check_health()

    async def __del__(self) -> None:  # after a failed start some parts are missing
        logger.info("the replica stops", extra={"event": "replica stops"})
        for task in getattr(self, "_tasks", ()):
            task.cancel()
        if meter := getattr(self, "_meter", None):
            await meter.stop()
        if metrics_socket := getattr(self, "_metrics_socket", None):
            metrics_socket.close()
        if tracer := getattr(self, "_tracer", None):
            await asyncio.to_thread(tracer.shutdown)
        if engine := getattr(self, "_engine", None):
            engine.shutdown(timeout_s=5)

    async def _follow(self) -> None:
        """Follow the catalogue, and compare the engine with it now and then. An outage is logged once, when it
        begins."""
        failing, audited = False, time.monotonic()
        while True:
            await asyncio.sleep(self._settings.catalogue_poll_s)
            try:
                await self._reconciler.follow()
                if time.monotonic() - audited > self._settings.drift_check_s:
                    audited = time.monotonic()
                    await self._reconciler.repair_drift()
                failing = False
            except Exception:  # any error may be over at the next attempt
                self._recorder.follow_failed()
                if not failing:
                    logger.exception("could not follow the catalogue")
                failing = True

    async def _watch_identity(self) -> None:
        settings = self._settings
        tolerance_nats = settings.admission.golden_tolerance_nats
        identity_checker = IdentityChecker(self._engine, self._pool, tolerance_nats, self._recorder)
        while period_s := settings.metrics.identity_check_s:
            await asyncio.sleep(period_s)
            try:
                await identity_checker.check()
            except Exception:  # the engine and the queue report their faults themselves
                logger.debug("could not check the identity of an adapter", exc_info=True)

    async def _end_with_engine(self) -> None:
        """Ends the process when its engine has died. The proxy then sends the requests that were not answered yet to
        another replica. Until a health check finds a dead engine, seconds would pass."""
        while not self._engine.is_dead:  # noqa: ASYNC110  (vLLM sets a flag, and there is no event to wait for)
            await asyncio.sleep(_ENGINE_POLL_S)
        logger.error("the engine died, and this replica ends with it", extra={"event": "engine died"})
        await asyncio.sleep(_LAST_EVENTS_S)
        try:
            async with asyncio.timeout(_LAST_WRITE_S):
                await self._meter.stop()
            if self._settings.metrics.directory:
                self._metrics_socket.leave_final_snapshot()
        except Exception:
            logger.exception("could not save usage and metrics at the end")
        os._exit(1)


def import_engine(settings: ServeSettings) -> type[VllmEngine]:
    """The engine's class. Importing vLLM takes seconds, and only replicas need it. Raises EngineRefused, without that,
    where there is no model, or another one."""
    check_model(settings)
    if not settings.gpus_per_replica:
        # On a CPU nothing is compiled while it runs: vLLM would begin with the first request for log-probabilities,
        # which takes seconds, and where there is no compiler that request would end the engine.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    from serve.engine.vllm_engine import VllmEngine

    return VllmEngine


def pool_of(engine: Engine, store: AdapterStore, settings: ServeSettings, events: Events = NO_EVENTS) -> AdapterPool:
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
