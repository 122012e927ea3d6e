"""Runs `python -m serve run` for an example or a test: starts it, waits until it is ready, stops all its processes."""

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

from serve.catalogue.state_dir import StateDir
from serve.deployment.ports import free_port
from serve.errors import ServerNotRunning

START_TIMEOUT_S = 900  # several servers may start on two busy cores
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

    The server's output goes to `log`, or to the error stream of this program. Raises RuntimeError with the end of that
    output if the server does not start.
    """
    port = port or free_port()
    state_options = ["--state", store, "--local", str(state)] if store else ["--state", str(state)]
    command = [sys.executable, "-m", "serve", "run", *map(str, artifacts), *state_options, "--port", str(port)]
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("w")) if log else None
        server = start([*command, *options], output)
        stack.callback(stop, server)
        yield wait_until_ready(server, StateDir(state), log)


async def publish(artifact: Path, state: Path) -> dict[str, Any]:
    """The JSON of `python -m serve publish` on a server's state directory. Raises RuntimeError if the command fails."""
    return await answer_of("publish", str(artifact), state=state)


async def answer_of(*words: str, state: Path) -> dict[str, Any]:
    """The JSON of a command of `python -m serve` on a server's state directory. Raises RuntimeError if it fails."""
    command = [sys.executable, "-m", "serve", *words, "--state", str(state), "--json"]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    output, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"`python -m serve {' '.join(words)}` failed")
    answer: dict[str, Any] = json.loads(output)
    return answer


def wait_until_ready(server: subprocess.Popen[bytes], state: StateDir, log: Path | None) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(ServerNotRunning):
            announced = state.running_server()
            if announced.pid == server.pid:
                return announced.url
        time.sleep(0.2)
    log_tail = log.read_text()[-2000:] if log else "see above"
    raise RuntimeError(f"the server did not come up (exit status {server.poll()}): {log_tail}")


def start(
    command: Sequence[str], output: IO[Any] | None, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a server that `stop` will end. Its output goes to `output`, or to the output of this program."""
    # In its own process group, so that Ctrl-C ends this program, and this program ends the server. Not in its own
    # session: Linux divides the processors between sessions first, and while the server keeps all of them busy, some
    # kernels let the processes of another session wait for seconds.
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, process_group=0
    )


def stop(server: subprocess.Popen[bytes], timeout_s: float = STOP_TIMEOUT_S) -> None:
    """Send SIGTERM, and after `timeout_s` SIGKILL to the whole process group."""
    server.terminate()
    try:
        server.wait(timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
