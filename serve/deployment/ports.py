"""Ports of this machine that a server listens on."""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import Iterable

from serve.errors import PortInUse

# Below those that the system lends to outgoing connections: what is free here stays free until it is listened on.
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
    """One that nobody listens on. Raises PortInUse."""
    return free_block(1, _SINGLE).start


def free_block(count: int, within: range = _BLOCKS) -> range:
    """`count` ports in a row that nobody listens on, another row with each call. Raises PortInUse."""
    starts = within[: -count + 1 or None : count]
    first = secrets.randbelow(len(starts))
    for start in (*starts[first:], *starts[:first]):
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
