"""The witnesses of the fault suite: they must see what they are there to see."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import httpx
import pytest

from benchmarks.faults.callers import Callers, Said, failure
from benchmarks.faults.link import Link
from benchmarks.faults.run import Publisher
from benchmarks.soak import growth

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"


@pytest.fixture
async def link() -> AsyncIterator[Link]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(ANSWER)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    link = Link(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", delay_s=0.2)
    link.start()
    yield link
    link.stop()
    server.close()


async def get(link: Link) -> httpx.Response:
    async with httpx.AsyncClient(timeout=1) as client:
        return await client.get(f"http://127.0.0.1:{link.port}/")


async def test_an_open_link_carries_everything(link: Link) -> None:
    assert (await get(link)).text == "ok"


async def test_a_slow_link_carries_it_later(link: Link) -> None:
    with link.being("slow"):
        began = time.monotonic()
        assert (await get(link)).text == "ok"
        assert time.monotonic() - began >= 0.4, "there and back"


async def test_a_failing_link_answers_for_the_other_end(link: Link) -> None:
    with link.being("failing"):
        assert (await get(link)).status_code == 503


async def test_a_silent_link_says_nothing_and_one_that_is_gone_hangs_up(link: Link) -> None:
    with link.being("silent"), pytest.raises(httpx.ReadTimeout):
        await get(link)
    with link.being("gone"), pytest.raises((httpx.NetworkError, httpx.RemoteProtocolError)):
        await get(link)
    assert (await get(link)).text == "ok", "and all is well again"


def test_an_answer_is_right_only_from_a_revision_that_the_name_means_with_that_text() -> None:
    said = Said({"base": "a", "french@1": "b", "german@1": "c"}, {"french": {"french@1"}})

    assert said.is_right("french", "french@1", "b")
    assert said.is_right("base", "base", "a")
    assert not said.is_right("french", "french@1", "c"), "another one's words"
    assert not said.is_right("french", "german@1", "c"), "another one"
    assert not said.is_right("french", "french@1 and french@2", "b"), "two of them"


def test_an_error_is_clear_if_it_has_the_form_of_the_api_and_can_be_tried_again() -> None:
    shaped = b'{"error": {"message": "try again", "code": "engine_unavailable"}}'

    assert failure(503, shaped)[0] == "refused"
    assert failure(500, shaped)[0] == "unclear"
    assert failure(503, b"<html>503 Service Unavailable</html>")[0] == "unclear"


async def test_an_answer_that_ends_before_its_end_is_broken() -> None:
    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10_000)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nConnection: close\r\n\r\n")
        writer.write(b'data: {"model": "base", "choices": [{"text": "a"}]}\n\n')
        writer.close()

    server = await asyncio.start_server(half, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    asked = await Callers(url, "key", "base", Said({"base": "a"})).ask("base", stream=True)
    server.close()

    assert asked.outcome == "broken"


def test_an_acknowledged_publish_is_lost_only_if_nothing_later_explains_what_is_there() -> None:
    publisher = Publisher(world=None)  # type: ignore[arg-type]
    publisher.acknowledged.append("one")
    assert publisher.is_lost("two")

    publisher.tried.append("two")
    assert not publisher.is_lost("two"), "it was tried, and nobody was told how it ended"
    assert not publisher.is_lost("one")


def test_growth_compares_the_last_third_with_the_one_before() -> None:
    assert growth([100, 100, 100, 1, 1, 1, 2, 2, 2]) == 2
