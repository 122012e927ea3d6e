"""A real Prometheus scrapes the real exporter of a gateway whose engine has no model: every query has data, and alerts
fire for faults that are really there. tests/e2e/observe does the same with real engines."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Thread

import pytest

from examples.observe.prometheus import Prometheus, is_installed, running_prometheus
from examples.observe.queries import panel_queries
from serve.adapters.identity_check import IdentityChecker
from serve.adapters.rollout import Rollouts, begin_split
from serve.catalogue.split import SplitPolicy
from serve.deployment.metrics_socket import MetricsSocket
from serve.names import AdapterRevision
from serve.observability.exporter import Exporter, listen
from serve.observability.recorder import Finished
from tests.serve.conftest import candidate
from tests.serve.measured import PIRATE, ZEPHYR, Server, logs, server, stream
from tests.serve.observability.test_exporter import certificate

__all__ = ["logs", "server"]  # fixtures

pytestmark = pytest.mark.skipif(
    not is_installed(), reason="Prometheus is a package of the system (apt-get install prometheus), not of PyPI"
)


# Of a model, of a fault, of a change that isn't made here, of HAProxy, of a GPU, of what a replica measures by itself.
FOREIGN = ("vllm:", "ALERTS", "graft_proxy_", "DCGM_", "graft_disk_", "rollback")


@dataclass
class Watched:
    server: Server
    prometheus: Prometheus

    async def until(self, condition: Callable[[], object], timeout_s: float = 120) -> None:
        async with asyncio.timeout(timeout_s):
            while not await asyncio.to_thread(condition):  # noqa: ASYNC110  (what is waited for is in another process)
                await asyncio.sleep(0.3)

    async def sees(self, expression: str) -> None:
        """A count must be there at zero before it can be seen to increase."""
        await self.until(lambda: self.prometheus.query(expression))

    async def fires(self, alert: str) -> None:
        await self.until(lambda: alert in self.prometheus.firing())


@pytest.fixture
async def watched(server: Server, tmp_path: Path) -> AsyncIterator[Watched]:
    with tempfile.TemporaryDirectory(prefix="graft-") as sockets:
        exposition = MetricsSocket(Path(sockets), "one", server.snapshot)
        await exposition.start()
        expiring = certificate(tmp_path / "tls.crt", datetime.now(UTC) + timedelta(days=3))
        http = listen(Exporter(Path(sockets), [expiring]), "127.0.0.1", 0)
        Thread(target=http.serve_forever, daemon=True).start()
        targets = [f"127.0.0.1:{http.server_address[1]}"]
        with running_prometheus(targets, tmp_path / "prometheus", scrape_s=1) as prometheus:
            yield Watched(server, prometheus)
        http.shutdown()
        http.server_close()
        exposition.close()


async def busy(server: Server, seconds: float) -> None:
    """Requests of two adapters that don't fit together, a wrong one now and then, and what their engine would say."""
    server.engine.handler = stream
    for number in range(int(seconds / 0.1)):
        adapter = (PIRATE, ZEPHYR)[number // 5 % 2].adapter
        await server.ask("nobody" if number % 7 == 6 else adapter.name)
        await server.ask("small-llama")
        server.recorder.engine_finished(Finished(adapter.engine_name, 10, 5, 8, 0.02))
        await asyncio.sleep(0.1)


async def test_every_query_of_ours_has_data(watched: Watched) -> None:
    server = watched.server
    other = candidate("pirate", "other")
    server.snapshot.rollouts = rollouts = Rollouts(_give_up)
    await server.ask("pirate")
    await watched.sees('graft_changes_total{verb="publish"}')
    await server.control.publish(other)
    await begin_split(server.control, "pirate", PIRATE.revision, "canary", SplitPolicy(share=0.5))
    assert server.snapshot.reconciler
    rollouts.choose(server.snapshot.reconciler.catalogue, other.adapter, "someone")
    await busy(server, 8)

    ours = [query for query in panel_queries("5s") if not any(word in query.expression for word in FOREIGN)]
    empty = [
        query for query in ours if not await asyncio.to_thread(watched.prometheus.query_range, query.expression, 20, 1)
    ]
    assert [str(query) for query in empty] == []
    assert len(ours) > 60


async def test_alerts_fire_for_faults_that_are_really_there(watched: Watched) -> None:
    server, engine = watched.server, watched.server.engine
    await server.ask("pirate")
    identity_checker = IdentityChecker(engine, server.pool, 0.25, server.recorder)
    await identity_checker.check()
    await watched.sees('graft_identity_violations_total{adapter="pirate"}')
    assert "GraftIdentityViolation" not in await asyncio.to_thread(watched.prometheus.firing)

    engine.says[PIRATE.adapter] = -9.0
    await identity_checker.check()
    engine.resident.clear()  # it lost what it held
    await server.pool.repair_drift()
    bad = candidate("pirate", "bad")
    engine.refuses.add(bad.adapter)
    with pytest.raises(Exception, match="was not published"):
        await server.control.publish(bad)

    for alert in ("GraftIdentityViolation", "GraftEngineDrift", "GraftPublishFailing", "GraftExpiresSoon"):
        await watched.fires(alert)


async def test_failing_requests_burn_the_budget_of_their_adapter_only(watched: Watched) -> None:
    async def fail(*_: object) -> None:
        raise RuntimeError("a fault")

    await busy(watched.server, 1)
    await watched.sees('graft_requests_total{adapter="zephyr"}')
    watched.server.engine.handler = fail
    for _ in range(30):
        await watched.server.ask("zephyr")
        await asyncio.sleep(0.1)

    await watched.fires("GraftAvailabilityBurn")
    firing = await asyncio.to_thread(watched.prometheus.query, 'ALERTS{alertname="GraftAvailabilityBurn"}')
    assert {alert["metric"]["adapter"] for alert in firing} == {"zephyr"}


async def _give_up(_: AdapterRevision, __: str) -> None: ...
