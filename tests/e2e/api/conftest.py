"""The official clients of a running server, and what they ask for."""

from __future__ import annotations

import anthropic
import openai
import pytest

from tests.e2e.conftest import Server

MODEL = "french"


@pytest.fixture(scope="session")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="session")
def claude(server: Server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=60)
