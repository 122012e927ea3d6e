"""The metrics of a replica, on a Unix socket of its node: a connection gets all of them, and is closed.

There is no port, HTTP or Ray in between: only the exporter of the node (`serve.observability.exporter`) connects.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path

from prometheus_client import REGISTRY, generate_latest
from prometheus_client.core import Metric

from convert.artifact.durable_files import replace_file
from serve.deployment.metrics_collector import MetricsCollector
from serve.observability.exporter import FINAL_SNAPSHOT_SUFFIX, SOCKET_SUFFIX
from serve.observability.metrics import ALL, ENGINE_UP, READY

# Metrics that are still true after the replica has ended.
_LASTING_TYPES = ("counter", "histogram")
_LASTING_NAMES = (ENGINE_UP.name, READY.name)
_OWN_NAMES = frozenset(spec.name.removesuffix("_total") for spec in ALL)


class MetricsSocket:
    """Answers on DIRECTORY/REPLICA.sock from `start` to `close`."""

    def __init__(self, directory: Path, replica: str, collector: MetricsCollector) -> None:
        self._path = directory / f"{replica}{SOCKET_SUFFIX}"
        self._collector = collector
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._server = await asyncio.start_unix_server(self._answer, self._path)

    def close(self) -> None:
        if self._server:
            self._server.close()
        self._path.unlink(missing_ok=True)

    def leave_final_snapshot(self) -> None:
        """Write the metrics that the exporter reports for a while if this replica's process ends without `close`."""
        metrics = with_engine_metrics(self._collector.collect(), REGISTRY.collect())
        lasting = (metric for metric in metrics if metric.type in _LASTING_TYPES or metric.name in _LASTING_NAMES)
        text = b"".join(generate_latest(_SingleMetric(metric)) for metric in lasting)
        replace_file(self._path.with_suffix(FINAL_SNAPSHOT_SUFFIX), text)

    async def _answer(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            async for chunk in exposition(self._collector):
                if writer.is_closing():
                    return  # the exporter has disconnected
                writer.write(chunk)
            await writer.drain()
        writer.close()


async def exposition(collector: MetricsCollector) -> AsyncIterator[bytes]:
    """Prometheus' text format, metric by metric. Requests go on between two of them."""
    for metric in with_engine_metrics(collector.collect(), REGISTRY.collect()):
        yield generate_latest(_SingleMetric(metric))
        await asyncio.sleep(0)


def with_engine_metrics(own: Iterable[Metric], engine: Iterable[Metric]) -> Iterator[Metric]:
    """Graft's metrics, then the engine's unchanged, without those that Graft exports itself: vLLM keeps one series for
    every set of adapters that ever ran together."""
    yield from own
    yield from (metric for metric in engine if metric.name not in _OWN_NAMES)


class _SingleMetric:
    """A registry of one metric, which is what prometheus_client formats."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterable[Metric]:
        return [self._metric]
