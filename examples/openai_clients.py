"""The official client for a server of this machine, without a proxy."""

from __future__ import annotations

from openai import AsyncOpenAI, DefaultAsyncHttpxClient, DefaultHttpxClient, OpenAI


def openai_client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="none", timeout=300, http_client=DefaultHttpxClient(trust_env=False))


def async_openai_client(url: str) -> AsyncOpenAI:
    """A client that retries nothing, so that every failed request is seen."""
    return AsyncOpenAI(
        base_url=f"{url}/v1",
        api_key="none",
        max_retries=0,
        timeout=120,
        http_client=DefaultAsyncHttpxClient(trust_env=False),
    )
