from __future__ import annotations

import asyncio

from starlette.types import Message, Scope

from serve.client import Client

# As the proxy sends it on: nobody else watches for the caller's leaving.
WATCHED: Scope = {"type": "http", "headers": [(b"x-request-disconnect-disabled", b"?1")]}


async def test_a_caller_that_has_all_of_its_answer_has_not_left() -> None:
    """Whoever answers, the engine or another replica: uvicorn tells the end of an answer as a disconnect."""
    whole = asyncio.Event()

    async def receive() -> Message:
        await whole.wait()
        return {"type": "http.disconnect"}

    async def send(_: Message) -> None:
        whole.set()

    client = Client(receive)
    with client.watched(WATCHED):
        await asyncio.sleep(0.1)  # it is watched by now
        await client.telling(send)({"type": "http.response.body", "body": b"all"})
        await asyncio.sleep(0.05)

    assert not client.has_left
