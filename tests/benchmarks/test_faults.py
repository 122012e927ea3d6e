"""The checks of the fault suite detect what they are meant to detect."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import httpx
import pytest

from benchmarks.faults.callers import Callers, ExpectedAnswers, RequestResult, classify_error
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


async def get(link: Link, timeout_s: float = 60) -> httpx.Response:
    async with httpx.AsyncClient(timeout=timeout_s) as client:
        return await client.get(f"http://127.0.0.1:{link.port}/")


async def test_an_open_link_forwards_everything(link: Link) -> None:
    assert (await get(link)).text == "ok"


async def test_a_slow_link_delays_both_directions(link: Link) -> None:
    with link.in_mode("slow"):
        began = time.monotonic()
        assert (await get(link)).text == "ok"
        assert time.monotonic() - began >= 0.4, "there and back"


async def test_a_failing_link_answers_for_the_other_end(link: Link) -> None:
    with link.in_mode("failing"):
        assert (await get(link)).status_code == 503


async def test_a_silent_link_never_answers_and_a_gone_link_resets_the_connection(link: Link) -> None:
    with link.in_mode("silent"), pytest.raises(httpx.TimeoutException):
        await get(link, timeout_s=1)
    with link.in_mode("gone"), pytest.raises((httpx.NetworkError, httpx.RemoteProtocolError)):
        await get(link)
    assert (await get(link)).text == "ok", "open again"


def test_an_answer_is_correct_only_with_the_text_of_a_revision_that_the_name_pointed_to() -> None:
    expected = ExpectedAnswers({"base": "a", "french@1": "b", "german@1": "c"}, {"french": {"french@1"}})

    assert expected.is_correct("french", "french@1", "b")
    assert expected.is_correct("base", "base", "a")
    assert not expected.is_correct("french", "french@1", "c"), "the text of another revision"
    assert not expected.is_correct("french", "german@1", "c"), "a revision of another name"
    assert not expected.is_correct("french", "french@1 and french@2", "b"), "two revisions"


def test_an_error_is_a_clear_refusal_if_it_has_the_format_of_the_api_and_is_retryable() -> None:
    shaped = b'{"error": {"message": "try again", "code": "engine_unavailable"}}'

    assert classify_error(503, shaped)[0] == "refused"
    assert classify_error(500, shaped)[0] == "unclear"
    assert classify_error(503, b"<html>503 Service Unavailable</html>")[0] == "unclear"


@pytest.mark.parametrize(("first_s", "expected"), [(None, "hung"), (2.0, "answered")], ids=["nothing", "a-stream"])
def test_an_answer_counts_as_hung_if_nothing_of_it_arrived_for_too_long(first_s: float | None, expected: str) -> None:
    late = RequestResult("french", first_s is not None, began_s=1, ended_s=31, outcome="answered", first_s=first_s)

    assert late.judged(hung_after_s=5).outcome == expected
    assert late.judged(hung_after_s=40).outcome == "answered"


async def test_a_stream_that_ends_without_its_last_event_is_broken() -> None:
    async def send_half_a_stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10_000)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nConnection: close\r\n\r\n")
        writer.write(b'data: {"model": "base", "choices": [{"text": "a"}]}\n\n')
        writer.close()

    server = await asyncio.start_server(send_half_a_stream, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    result = await Callers(url, "key", "base", ExpectedAnswers({"base": "a"})).ask("base", stream=True)
    server.close()

    assert result.outcome == "broken"


def test_an_acknowledged_publish_is_lost_unless_a_later_attempt_explains_the_current_revision() -> None:
    publisher = Publisher(testbed=None)  # type: ignore[arg-type]
    publisher.acknowledged.append("one")
    assert publisher.is_lost("two")

    publisher.attempted.append("two")
    assert not publisher.is_lost("two"), "an attempt without an acknowledgement may have taken effect"
    assert not publisher.is_lost("one")


def test_growth_compares_the_last_third_with_the_one_before() -> None:
    assert growth([100, 100, 100, 1, 1, 1, 2, 2, 2]) == 2
