"""Ports of this machine that a server listens on."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Iterable

from serve.errors import PortInUse

# Below the ports that the system gives to outgoing connections. So a port that is free now stays free until the server
# listens on it.
_SINGLE = range(10_000, 20_000)
_BLOCKS = range(20_000, 32_000)


def check_port(host: str, port: int, option: str = "--port") -> None:
    """Raises PortInUse, while there is still nothing to clean up, if nobody can listen there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise PortInUse(
                f"Can't listen on {host}:{port}: {error.strerror}. Choose another with {option}."
            ) from error


def free_port() -> int:
    """A port that nobody listens on. Raises PortInUse."""
    return free_block(1, _SINGLE).start


def free_block(count: int, within: range = _BLOCKS) -> range:
    """`count` ports in a row that nobody listens on, chosen at random, so that servers which start at the same time get
    different ones. Raises PortInUse."""
    starts = range(within.start, within.stop - count + 1, count)
    for start in random.SystemRandom().sample(starts, len(starts)):
        block = range(start, start + count)
        if _are_free(block):
            return block
    raise PortInUse(
        f"No {count} free ports in a row between {within.start} and {within.stop}. Stop what listens on many of them."
    )


def _are_free(ports: Iterable[int]) -> bool:
    with contextlib.suppress(PortInUse):
        for port in ports:
            check_port("", port)
        return True
    return False
