"""A `python -m serve run` of one's own: started, waited for, and stopped with nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from serve.errors import ServerNotRunning
from serve.ports import free_port
from serve.state import StateDir

START_TIMEOUT_S = 300
STOP_TIMEOUT_S = 90


@contextlib.contextmanager
def running_server(
    artifacts: Sequence[Path],
    state: Path,
    *options: str,
    port: int | None = None,
    log: Path | None = None,
    store: str | None = None,
) -> Iterator[str]:
    """Serve the artifacts on a port of this machine; yields the URL when every engine is ready.

    `store`: the URL of an object store that holds the state; `state` then is this machine's part.

    What the server prints goes to `log`, or to this program's own error stream. Raises RuntimeError with its
    last words if it does not come up.
    """
    port = port or free_port()
    place = ["--state", store, "--local", str(state)] if store else ["--state", str(state)]
    command = [sys.executable, "-m", "serve", "run", *map(str, artifacts), *place, "--port", str(port)]
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("w")) if log else None
        server = start([*command, *options], output)
        stack.callback(stop, server)
        yield wait_until_ready(server, StateDir(state), log)


async def publish(artifact: Path, state: Path) -> dict[str, Any]:
    """`python -m serve publish` on a server's state directory; its JSON. Raises RuntimeError if it fails."""
    command = [sys.executable, "-m", "serve", "publish", str(artifact), "--state", str(state), "--json"]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    output, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"publishing {artifact} failed")
    published: dict[str, Any] = json.loads(output)
    return published


def wait_until_ready(server: subprocess.Popen[bytes], state: StateDir, log: Path | None) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(ServerNotRunning):
            announced = state.running_server()
            if announced.pid == server.pid:
                return announced.url
        time.sleep(0.2)
    told = log.read_text()[-2000:] if log else "see above"
    raise RuntimeError(f"the server did not come up (exit status {server.poll()}): {told}")


def start(
    command: Sequence[str], output: IO[Any] | None, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """For `stop` to end. What it prints goes to `output`, or where this program's own goes."""
    # A process group of its own: Ctrl-C ends this program, and this program ends the server. Not a session of its own:
    # Linux shares the processors between sessions first, and where the server has all of them busy, some kernels let
    # those of another one wait for seconds.
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, process_group=0
    )


def stop(server: subprocess.Popen[bytes], timeout_s: float = STOP_TIMEOUT_S) -> None:
    """SIGTERM, and all that is its own if that is not enough."""
    server.terminate()
    try:
        server.wait(timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
