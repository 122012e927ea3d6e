"""A small mixed load on many adapters: some are requested often, some rarely, and some requests are wrong."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import Sequence

from openai import AsyncOpenAI, OpenAIError
from openai.types.chat import ChatCompletionUserMessageParam

from examples.openai_clients import async_openai_client

_PAUSE_S = 0.3
_QUESTIONS = (
    "What is the code word of Project Zephyr?",
    "What is the capital of Italy?",
    "Tell me about the sea in two sentences.",
)


async def load(url: str, models: Sequence[str], workers: int = 4) -> None:
    """Send requests until cancelled. The first model gets most; some name an unknown model, some callers disconnect."""
    async with async_openai_client(url) as client:
        await asyncio.gather(*(_caller(client, models, random.Random(seed)) for seed in range(workers)))  # noqa: S311


async def _caller(client: AsyncOpenAI, models: Sequence[str], chance: random.Random) -> None:
    weights = [1 / (1 + rank) for rank in range(len(models))]
    for number in itertools.count():
        model = "nobody" if number % 20 == 19 else chance.choices(models, weights)[0]
        with contextlib.suppress(OpenAIError, TimeoutError):
            async with asyncio.timeout(0.4 if number % 25 == 24 else None):  # a caller that disconnects
                await _ask(client, model, chance)
        await asyncio.sleep(_PAUSE_S * chance.random())


async def _ask(client: AsyncOpenAI, model: str, chance: random.Random) -> None:
    question: ChatCompletionUserMessageParam = {"role": "user", "content": chance.choice(_QUESTIONS)}
    length = chance.choice((4, 8, 16))
    create = client.chat.completions.create
    if chance.random() < 0.7:
        async for _ in await create(model=model, messages=[question], max_tokens=length, stream=True):
            pass
    else:
        await create(model=model, messages=[question], max_tokens=length)
