from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

from serve.deployment.proxy.uvicorn_patches import with_write_coalescing


class Written:
    """A transport that keeps what is written to it."""

    def __init__(self) -> None:
        self.pieces: list[bytes | str] = []
        self.has_left = False

    def write(self, data: bytes) -> None:
        assert not self.has_left, "uvloop raises an error for this"
        self.pieces.append(data)

    def close(self) -> None:
        self.pieces.append("closed")

    def is_closing(self) -> bool:
        return self.has_left

    def get_extra_info(self, name: str) -> str:
        return f"the {name}"


class Protocol(asyncio.Protocol):
    def __init__(self, name: str) -> None:
        self.name = name

    def connection_made(self, transport: Any) -> None:
        self.transport = transport


def connected(count: int) -> list[tuple[Written, Any]]:
    """What is written in the end, and what a protocol writes to."""
    coalescing, both = with_write_coalescing(Protocol), []
    for number in range(count):
        protocol: Any = coalescing(name=str(number))
        assert protocol.name == str(number)
        protocol.connection_made(written := Written())
        both.append((written, protocol.transport))
    return both


async def test_pieces_of_one_turn_are_written_at_its_end_each_answer_s_as_one() -> None:
    (one, to_one), (other, to_other) = connected(2)

    for piece in (b"a", b"b", b"c"):
        to_one.write(piece)
    to_other.write(b"d")
    assert one.pieces == other.pieces == []

    await asyncio.sleep(0)
    assert (one.pieces, other.pieces) == ([b"abc"], [b"d"])
    to_one.write(b"e")
    await asyncio.sleep(0)
    assert one.pieces == [b"abc", b"e"]


async def test_what_was_said_before_a_connection_is_closed_arrives() -> None:
    [(written, transport)] = connected(1)

    transport.write(b"the end")
    transport.close()
    await asyncio.sleep(0)

    assert written.pieces == [b"the end", "closed"]


async def test_a_caller_that_left_meanwhile_keeps_nobody_else_s_answer_back() -> None:
    (one, to_one), (other, to_other) = connected(2)

    to_one.write(b"a")
    to_other.write(b"b")
    one.has_left = True
    await asyncio.sleep(0)

    assert (one.pieces, other.pieces) == ([], [b"b"])


async def test_much_is_written_at_once_and_in_order() -> None:
    [(written, transport)] = connected(1)

    transport.write(b"a")
    transport.write(b"b" * 100_000)
    assert [len(piece) for piece in written.pieces] == [100_001]
    transport.write(b"c")
    await asyncio.sleep(0)

    assert written.pieces == [b"a" + b"b" * 100_000, b"c"]


async def test_everything_else_is_the_transport_s() -> None:
    [(_, transport)] = connected(1)

    assert transport.get_extra_info("peername") == "the peername"


async def test_a_connection_that_ended_is_gone_without_the_garbage_collector() -> None:
    protocol: Any = with_write_coalescing(Protocol)(name="one")
    protocol.connection_made(Written())
    there = weakref.ref(protocol)
    gc.disable()
    try:
        del protocol
        assert there() is None
    finally:
        gc.enable()
