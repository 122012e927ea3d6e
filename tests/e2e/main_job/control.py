"""What the tests of the adapters' life ask of the server."""

from __future__ import annotations

import httpx

from serve.follower.admin_client import AdminClient
from tests.e2e.conftest import Server
from tests.e2e.main_job.test_answers import PROMPT


def answer(server: Server, model: str) -> httpx.Response:
    return httpx.post(
        f"{server.url}/v1/completions", json={"model": model, "prompt": PROMPT, "max_tokens": 1}, timeout=60
    )


def held(admin: AdminClient) -> list[list[str]]:
    return [replica["resident"] for replica in admin.replicas()]
