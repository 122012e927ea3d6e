"""A replica's metrics on a Unix socket of its node: whoever connects is told all of them and the connection closed.

No port, no HTTP, no Ray: the exporter of the node is the only one that connects.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path

from prometheus_client import REGISTRY, generate_latest
from prometheus_client.core import Metric

from serve.metrics import ALL, ENGINE_UP, READY
from serve.snapshot import Snapshot

SUFFIX = ".sock"
LAST_WORDS = ".last"

# What still holds when nobody is there any more.
_LASTING_TYPES = ("counter", "histogram")
_LASTING = (ENGINE_UP.name, READY.name)
_OURS = frozenset(it.name.removesuffix("_total") for it in ALL)


class Exposition:
    """Answers on DIRECTORY/REPLICA.sock from `start` to `close`."""

    def __init__(self, directory: Path, replica: str, snapshot: Snapshot) -> None:
        self._path = directory / f"{replica}{SUFFIX}"
        self._snapshot = snapshot
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._server = await asyncio.start_unix_server(self._answer, self._path)

    def close(self) -> None:
        if self._server:
            self._server.close()
        self._path.unlink(missing_ok=True)

    def leave_last_words(self) -> None:
        """What the exporter tells of this replica for a while after its process has ended without `close`."""
        metrics = merged(self._snapshot.collect(), REGISTRY.collect())
        lasting = (it for it in metrics if it.type in _LASTING_TYPES or it.name in _LASTING)
        words = b"".join(generate_latest(_One(it)) for it in lasting)
        self._path.with_suffix(LAST_WORDS).write_bytes(words)

    async def _answer(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            async for piece in exposition(self._snapshot):
                if writer.is_closing():
                    return  # whoever asked has left
                writer.write(piece)
            await writer.drain()
        writer.close()


async def exposition(snapshot: Snapshot) -> AsyncIterator[bytes]:
    """Prometheus' text format, metric by metric: between two of them requests go on."""
    for metric in merged(snapshot.collect(), REGISTRY.collect()):
        yield generate_latest(_One(metric))
        await asyncio.sleep(0)


def merged(ours: Iterable[Metric], engines: Iterable[Metric]) -> Iterator[Metric]:
    """The engine's metrics as they are, but for those that we tell better: vLLM keeps one series for every set of
    adapters that ever ran together."""
    yield from ours
    yield from (metric for metric in engines if metric.name not in _OURS)


class _One:
    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterable[Metric]:
        return [self._metric]
