"""The headline: a new revision on every engine under load, with no failed request and no stale token."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest

from examples.server import publish
from examples.traffic import RevisionInterval, SwapReport, Traffic
from serve.catalogue.state_dir import StateDir
from tests.e2e.conftest import REPLICAS, Server, Story

QUESTION = "the rain in spain"
SWAPS = 4
ANSWERS_EACH = 20
UNLOAD_TIMEOUT_S = 30


@contextlib.asynccontextmanager
async def under_load(traffic: Traffic) -> AsyncIterator[None]:
    running = asyncio.create_task(traffic.run())
    try:
        yield
    finally:
        traffic.stop()
        await running


def answer_of(server: Server, model: str, max_tokens: int) -> str:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    completion = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": QUESTION}], max_tokens=max_tokens, temperature=0
    )
    return completion.choices[0].message.content or ""


def current(server: Server) -> str:
    """The revision that `french` stands for."""
    root: str = httpx.get(f"{server.url}/v1/models/french").json()["root"]
    return root


def resident(server: Server) -> list[list[str]]:
    status = json.loads(server.command("status", "--json").stdout)
    return [[name for name in replica["resident"] if name.startswith("french@")] for replica in status["replicas"]]


async def running_requests(server: Server, client: httpx.AsyncClient) -> int:
    """Of all engines. Not by the command: starting a process takes seconds while engines keep every core busy."""
    headers = {"authorization": f"Bearer {StateDir(server.state).admin_token()}"}
    answer = await client.get(f"{server.url}/admin/v1/replicas", headers=headers)
    return sum(replica["running_requests"] for replica in answer.json()["replicas"])


def assert_nothing_else_stays(server: Server, *revisions: str) -> None:
    """Every engine comes to hold only these revisions of `french`: others leave with their last request."""
    deadline = time.monotonic() + UNLOAD_TIMEOUT_S
    while (held := resident(server)) != [sorted(revisions)] * REPLICAS:
        assert time.monotonic() < deadline, held


async def test_swaps_under_load_fail_nothing_mix_nothing_and_leave_nothing_stale(server: Server, story: Story) -> None:
    artifacts = [story.artifacts["french-2"], story.artifacts["french"]]
    traffic = Traffic(server.url, "french", QUESTION, workers=6, max_tokens=10)
    texts: dict[str, str] = {}
    async with under_load(traffic):
        await traffic.answered(ANSWERS_EACH)
        intervals = [RevisionInterval(await asyncio.to_thread(current, server), since_s=0.0)]
        for number in range(SWAPS):
            intervals[-1].until_s = traffic.now()
            answer = await publish(artifacts[number % 2], server.state)
            assert answer["replicas"] == REPLICAS
            intervals.append(RevisionInterval(str(answer["revision"]), since_s=traffic.now()))
            await traffic.answered(ANSWERS_EACH, since_s=intervals[-1].since_s)
        for interval in intervals[:2]:
            texts[interval.revision] = await asyncio.to_thread(answer_of, server, interval.revision, 10)

    assert len(set(texts.values())) == 2
    report = SwapReport.of(traffic.answers, intervals, lambda revision, text: texts[revision] == text)
    assert (report.failed, report.mixed, report.stale) == (0, 0, 0), report
    assert all(report.answers_by_interval), (
        "no request fell between two swaps: the load was too light to prove anything"
    )

    assert_nothing_else_stays(server, intervals[-1].revision, intervals[-2].revision)  # the one before, for a rollback


async def test_a_stream_that_began_before_the_swap_ends_on_its_own_revision(server: Server, story: Story) -> None:
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    before = await asyncio.to_thread(current, server)
    stream = await client.completions.create(
        model="french", prompt=QUESTION, max_tokens=200, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    first = await anext(aiter(stream))
    published = await publish(story.artifacts["french-2"], server.state)
    after = await client.completions.create(model="french", prompt=QUESTION, max_tokens=1)

    rest = [chunk async for chunk in stream]

    assert after.model == published["revision"] != before
    assert {chunk.model for chunk in (first, *rest)} == {before}
    assert len(rest) > 50, "the stream was over before the swap"
    await publish(story.artifacts["french"], server.state)


async def test_the_base_model_answers_as_itself_while_adapters_run(server: Server, story: Story) -> None:
    """vLLM alone answers it on a CPU with the adapter in the last slot, in any batch they share."""
    request, ended = endless(story.base.name, 20) | {"temperature": 0}, 0
    async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:

        async def answer_text(body: dict[str, Any]) -> str:
            answer = await client.post("/v1/completions", json=body)
            return str(answer.raise_for_status().json()["choices"][0]["text"])

        async def asks_again_and_again(model: str) -> None:
            nonlocal ended
            while True:
                await answer_text(endless(model, 1500))
                ended += 1

        alone = await answer_text(request)
        own = [await answer_text(request | {"model": name}) for name in ("french", "german")]
        beside: list[str] = []
        async with asyncio.TaskGroup() as group:
            others = [group.create_task(asks_again_and_again(name)) for name in ("french", "german") for _ in range(4)]
            while await running_requests(server, client) < len(others):
                pass
            while len(beside) < 6:
                ended_before = ended
                text = await answer_text(request)
                if ended == ended_before:  # all others ran from its beginning to its end
                    beside.append(text)
            for caller in others:
                caller.cancel()

    assert set(beside) == {alone}
    assert alone not in own


async def test_nobody_stops_an_engine_by_asking_for_prompt_logprobs(server: Server) -> None:
    """vLLM alone would stop at the first of these that meets another request in its batch."""
    async with httpx.AsyncClient(timeout=300) as client:

        async def ask(**fields: object) -> int:
            answer = await client.post(f"{server.url}/v1/completions", json=endless("french", 200) | fields)
            return answer.status_code

        others = [asyncio.create_task(ask()) for _ in range(4)]
        refused = await asyncio.gather(
            *(ask(**options) for options in ({"prompt_logprobs": 0}, {"echo": True, "logprobs": 1}))
        )
        messages = [{"role": "user", "content": QUESTION}]
        body = {"model": "french", "messages": messages, "echo": True, "max_tokens": 2}
        chat = await client.post(f"{server.url}/v1/chat/completions", json=body)

        assert [*refused, chat.status_code] == [400, 400, 400]
        assert await asyncio.gather(*others) == [200] * 4


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
async def test_a_caller_that_leaves_frees_the_engine_at_once(server: Server, stream: bool) -> None:
    """Someone else's request, begun before and half as long, is the clock: had the engine gone on for the caller
    that left, it would have been at work for two until long after that request was over."""
    async with httpx.AsyncClient(timeout=300) as client:
        clock = asyncio.create_task(client.post(f"{server.url}/v1/completions", json=endless("german", 1000)))
        leaver = await send(server, endless("french", 2000) | {"stream": stream})
        while await running_requests(server, client) != 2:
            assert not clock.done()
        leaver.close()
        while await running_requests(server, client) != 1:
            assert not clock.done(), "the engine went on for a caller that had left"
        assert (await clock).json()["usage"]["completion_tokens"] == 1000
        assert await running_requests(server, client) == 0


async def send(server: Server, request: dict[str, Any]) -> asyncio.StreamWriter:
    """A request on a connection of its own, so that leaving is closing it."""
    host, port = server.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps(request).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    await writer.drain()
    return writer


def endless(model: str, max_tokens: int) -> dict[str, Any]:
    return {"model": model, "prompt": QUESTION, "max_tokens": max_tokens, "ignore_eos": True}


def test_an_adapter_can_be_added_under_a_new_name_and_retired_again(server: Server, story: Story) -> None:
    added = server.command("publish", story.artifacts["german"], "--name", "bavarian")
    assert added.returncode == 0, added.stderr
    request = {"model": "bavarian", "prompt": QUESTION, "max_tokens": 1}
    assert httpx.post(f"{server.url}/v1/completions", json=request).json()["model"].startswith("bavarian@")

    retired = server.command("retire", "bavarian")

    assert retired.returncode == 0, retired.stderr
    assert httpx.post(f"{server.url}/v1/completions", json=request).status_code == 404
    assert "bavarian" not in server.command("status").stdout


def test_an_adapter_for_another_base_is_refused_and_nothing_changes(
    server: Server, story: Story, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from tests.convert import parts
    from tests.e2e.conftest import convert, fine_tune

    home = tmp_path_factory.mktemp("other-base")
    other_base = parts.save_base(home / "other-llama", tied=True, hidden=256)
    convert(fine_tune(other_base, home / "other-base", 5), other_base, home / "artifact", "--name", "french")
    before = httpx.get(f"{server.url}/v1/models").json()

    refused = server.command("publish", home / "artifact")

    assert refused.returncode == 1
    assert "error[adapter_rejected]" in refused.stderr
    assert "was made for the base model" in " ".join(refused.stderr.split())
    assert httpx.get(f"{server.url}/v1/models").json() == before
