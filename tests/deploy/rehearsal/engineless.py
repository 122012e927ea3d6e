"""What runs as `python -m serve` where no engine shall start: all of a server but Ray and vLLM.

Its options, its state, the keys, the catalogue, the admin API and the gateway are the real ones. The engine loads an
adapter in no time and answers with its name. `settings FILE` is what Ray would run of a RayService.

Stands alone: it is run in a container.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from starlette.types import Receive, Scope, Send

from serve.callers.ledger import Decision, Reservation, WindowUsage
from tests.serve.fakes import FakeEngine, respond


class Engine(FakeEngine):
    @classmethod
    async def start(cls, *_: Any) -> Engine:
        return cls()

    async def api(self, scope: Scope, receive: Receive, send: Send) -> None:
        model = json.loads((await receive())["body"])["model"]
        message = {"role": "assistant", "content": "This server has no engine."}
        await respond(send, 200, json.dumps({"model": model, "choices": [{"message": message}]}).encode())

    def shutdown(self, timeout_s: float) -> None:
        pass


class Unlimited:
    """In place of the actor of Ray that counts for all replicas."""

    async def reserve(self, reservation: Reservation) -> Decision:
        return Decision(None, tuple(WindowUsage(0, 0, 0.0) for _ in reservation.limits))

    async def _nothing(self, *_: Any) -> None:
        pass

    prepare = settle = withdraw = renew = _nothing


@contextlib.asynccontextmanager
async def replica(settings: Any, host: str, port: int) -> AsyncIterator[None]:
    """The only one of its deployment, with the parts that Ray or an engine would give it replaced."""
    import uvicorn

    from serve.deployment import replica as module
    from serve.deployment import shared_limits
    from serve.deployment.pools import connections

    class SingleReplica(module.EngineReplica.func_or_class):  # type: ignore[misc]
        async def sync(self, awaited: str | None = None) -> Sequence[Any]:
            return [await self._reconciler.sync(awaited)]

        async def report(self) -> Sequence[Any]:
            return [await self._reconciler.report()]

    alone = SingleReplica.__new__(SingleReplica)
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="replica-1"), app_name="graft")
    replaced: tuple[tuple[Any, str, Any], ...] = (
        (module, "import_engine", lambda _: Engine),
        (connections, "PoolReplicas", lambda *_: alone),
        (module, "RevisionVerifier", lambda *_: SimpleNamespace(verify=nothing)),
        (shared_limits, "ActorLedger", lambda _: Unlimited()),
        (module, "keep_replica_on", lambda _: None),
        (module, "node_address", lambda: "127.0.0.1"),
    )
    for owner, name, value in replaced:
        assert hasattr(owner, name)
        setattr(owner, name, value)
    module.ray_serve.get_replica_context = lambda: context
    await alone.__init__(settings.model_dump(mode="json"))
    server = uvicorn.Server(uvicorn.Config(await alone.__serve_build_asgi_app__(), host, port, lifespan="off"))
    task = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110  (uvicorn has no event for it)
        await asyncio.sleep(0.01)
    yield
    server.should_exit = True
    await task


async def nothing(*_: Any) -> None:
    pass


@contextlib.contextmanager
def local_server(pools: Sequence[Any], host: str, port: int, progress: Any, metrics: Any = None) -> Iterator[Any]:
    """In place of serve.deployment.local's; for one pool."""
    from serve.deployment.local import LocalServer

    (settings,) = pools
    ready, stopped = threading.Event(), threading.Event()

    async def run() -> None:
        async with replica(settings, host, port):
            ready.set()
            await asyncio.to_thread(stopped.wait)

    thread = threading.Thread(target=asyncio.run, args=(run(),), daemon=True)
    thread.start()
    while not ready.wait(0.1):
        assert thread.is_alive()
    try:
        with tempfile.TemporaryDirectory() as metrics_directory:
            yield LocalServer(f"http://{host}:{port}", Path(metrics_directory))
    finally:
        stopped.set()
        thread.join()


def main() -> None:
    if sys.argv[1] == "settings":
        from serve.deployment.settings_file import read_settings

        with local_server([read_settings(Path(sys.argv[2]))], "0.0.0.0", 8000, None):
            threading.Event().wait()
    from serve.cli.app import app
    from serve.deployment import local

    local.local_server = local_server
    local.wait_while_ray_runs = lambda warn: time.sleep(1e9)
    app()


if __name__ == "__main__":
    main()
