"""The Ray Serve deployment: one engine, one gateway, one copy of the catalogue."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

from ray import serve as ray_serve

from serve.admin import Admin
from serve.admission import Admission
from serve.config import ServeSettings
from serve.errors import ReplicaUnreachable
from serve.gateway import Gateway
from serve.probe import Prover
from serve.publish import Control, most_pinned
from serve.reconcile import Reconciler, ReplicaReport
from serve.residency import AdapterPool
from serve.state import StateDir

DEPLOYMENT = "EngineReplica"

logger = logging.getLogger(__name__)


@ray_serve.deployment(name=DEPLOYMENT)
@ray_serve.ingress()  # late-bound: the engine's application exists only after the engine does
class EngineReplica:
    """Ready only when it holds what the catalogue asks for; follows it by notification and by a slow poll."""

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        from serve.vllm_engine import VllmEngine  # seconds of import, needed in replicas only

        self._settings = ServeSettings.model_validate(settings)
        self._engine = await VllmEngine.start(self._settings.engine)
        context = ray_serve.get_replica_context()
        state = StateDir(self._settings.state_url or self._settings.state_dir, self._settings.state_dir)
        self._log, self._store = state.log, state.store
        self._pool = AdapterPool(self._engine, self._store, self._settings.engine.max_resident_adapters)
        self._reconciler = Reconciler(
            context.replica_id.unique_id,
            self._log,
            self._engine,
            self._pool,
            Prover(self._engine, self._store, self._settings.admission).prove,
            self._settings.keep_previous,
        )
        self._replicas = RayReplicas(context.app_name, self._settings.sync_timeout_s)
        await self._reconciler.start()
        self._following = asyncio.create_task(self._follow())

    async def __serve_build_asgi_app__(self) -> Gateway:
        settings = self._settings
        admin = Admin(
            settings.gateway.admin_tokens,
            settings.engine,
            settings.admission,
            Admission(settings.engine, settings.admission),
            self._store,
            Control(
                self._log, self._replicas, settings.sync_timeout_s, most_pinned(settings.engine.max_resident_adapters)
            ),
        )
        return Gateway(settings, self._engine, self._pool, lambda: self._reconciler.catalogue, admin)

    async def sync(self, awaited: str | None = None) -> dict[str, Any]:
        """Follow the catalogue now; the ReplicaReport as plain data."""
        report = await self._reconciler.sync(awaited)
        return report.model_dump()

    async def check_health(self) -> None:
        await self._engine.check_health()

    async def __del__(self) -> None:
        if following := getattr(self, "_following", None):
            following.cancel()
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
                if not failing:
                    logger.exception("could not follow the catalogue")
                failing = True


class RayReplicas:
    """serve.publish.Replicas through Ray Serve's broadcast."""

    def __init__(self, app_name: str, timeout_s: float) -> None:
        self._handle = ray_serve.get_deployment_handle(DEPLOYMENT, app_name)
        self._timeout_s = timeout_s

    async def sync(self, awaited: str | None = None) -> Sequence[ReplicaReport]:
        response = self._handle.broadcast("sync", awaited)
        try:
            reports = await response.results_async(timeout_s=self._timeout_s)
        except Exception as error:
            raise ReplicaUnreachable(f"A replica did not answer within {self._timeout_s} s: {error!r}.") from error
        return [ReplicaReport.model_validate(report) for report in reports]
