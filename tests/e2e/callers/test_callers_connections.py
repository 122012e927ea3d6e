"""Dropped connections, a replica that is killed, and a server that stops: after test_callers, on its server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from serve.catalogue.state_dir import StateDir
from tests.e2e.callers.conftest import LEASE_S, PATH, Guarded, code, completion, for_long, stream, total, until
from tests.e2e.conftest import REPLICAS, arguments_of

CONNECTIONS = 10_000


async def test_ten_thousand_connections_opened_and_dropped_leave_nothing_behind(guarded: Guarded) -> None:
    secret, (host, _, port) = guarded.key("passing"), guarded.server.url.removeprefix("http://").partition(":")
    body = json.dumps(completion(tokens=20)).encode()
    head = f"POST {PATH} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {secret}\r\ncontent-length: {len(body)}\r\n\r\n"
    sent = (b"", head.encode() + body[:-5], head.encode() + body)

    def come_and_go() -> None:
        for number in range(CONNECTIONS):
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=30) as connection:
                connection.sendall(sent[number % 20 if number % 20 < 3 else number % 2])

    def descriptors() -> int:
        return sum(process.num_fds() for process in guarded.processes())

    async with guarded.client(secret) as client:
        await asyncio.gather(*(client.post(PATH, json=completion(tokens=1)) for _ in range(20)))
    before = descriptors()

    await asyncio.to_thread(come_and_go)

    await until(lambda: total(guarded, 0))

    async def as_before() -> bool:
        return descriptors() <= before + REPLICAS  # a connection of the proxy that is kept for the next request

    await until(as_before)
    async with guarded.client(guarded.key("after")) as client:
        assert (await client.post(PATH, json=completion(tokens=1))).status_code == 200


async def test_no_key_is_in_any_log(guarded: Guarded) -> None:
    """Of Ray, Serve, the replicas, vLLM and HAProxy; run after the other tests had their keys used."""
    server = psutil.Process(StateDir(guarded.server.state).running_server().pid)
    arguments = [argument for process in server.children(recursive=True) for argument in arguments_of(process)]
    homes = {home for argument in arguments for home in re.findall(r"(/[^=:\s]*/graft-[^/]+/ray)/", argument)}
    logs = [Path(home) / "session_latest" / "logs" for home in homes]
    assert any("EngineReplica" in path.name for log in logs for path in log.rglob("*")), "where replicas write"
    unknown = "graft-" + "x" * 43
    async with guarded.client(unknown) as client:
        assert (await client.post(PATH, json=completion())).status_code == 401
    await asyncio.sleep(1)

    searched = [*map(str, logs), str(guarded.server.state)]
    for secret in (*guarded.secrets.values(), unknown):
        assert await asyncio.to_thread(files_with, secret, searched) == ""


def files_with(text: str, paths: list[str]) -> str:
    return subprocess.run(["grep", "-rlF", text, *paths], check=False, capture_output=True, text=True).stdout


async def test_a_killed_replica_gives_the_concurrent_requests_of_its_callers_back(guarded: Guarded) -> None:
    async with (
        guarded.client(guarded.key("four", concurrent_requests=4)) as client,
        contextlib.AsyncExitStack() as stack,
    ):
        for _ in range(4):
            response = await stack.enter_async_context(stream(client, for_long(n=16)))
            assert response.status_code == 200
        assert code(await client.post(PATH, json=completion(tokens=1))) == (429, "rate_limit_exceeded")

        for process in guarded.processes():
            process.send_signal(signal.SIGKILL)
        killed_s = time.monotonic()
        with contextlib.suppress(httpx.HTTPError):
            await stack.aclose()

    async with guarded.client(guarded.secrets["four"]) as client:

        async def answers() -> bool:
            with contextlib.suppress(httpx.HTTPError):
                return (await client.post(PATH, json=completion(tokens=1))).status_code == 200
            return False

        await until(answers, 240)
        await asyncio.sleep(max(0.0, killed_s + LEASE_S + 1 - time.monotonic()))
        at_once = await asyncio.gather(*(client.post(PATH, json=completion(tokens=100)) for _ in range(4)))
        assert {answer.status_code for answer in at_once} == {200}, "all four are free"


async def test_streams_finish_while_the_server_stops_and_new_requests_are_refused(guarded: Guarded) -> None:
    """The last one: it stops the server."""

    async def replicas_are_back() -> bool:
        return len(await guarded.running()) == REPLICAS

    await until(replicas_are_back, 240)
    pid = StateDir(guarded.server.state).running_server().pid
    async with guarded.client(guarded.key("patient")) as client:

        async def read_on(started: asyncio.Event) -> str:
            async with stream(client, completion(tokens=400)) as response:
                received = ""
                async for text in response.aiter_text():
                    started.set()
                    received += text
                return received

        begun = [asyncio.Event() for _ in range(2 * REPLICAS)]
        streams = [asyncio.create_task(read_on(event)) for event in begun]
        for event in begun:
            await event.wait()

        os.kill(pid, signal.SIGTERM)

        for answer in await asyncio.gather(*streams):
            assert answer.endswith("data: [DONE]\n\n")
        await until(lambda: gone(client))


async def gone(client: httpx.AsyncClient) -> Any:
    try:
        await client.get("/health")
    except httpx.HTTPError:
        return True
    return False
