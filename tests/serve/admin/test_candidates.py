"""The admin API with a candidate whose files are in the store already, and who may call it."""

from __future__ import annotations

from dataclasses import asdict

import httpx
import pytest

from serve.catalogue.log import CatalogueLog
from tests.serve.fakes import FakeEngine
from tests.serve.one_replica import ADMIN, NEW, OLD, TOKEN


def body(**changes: object) -> dict[str, object]:
    return {"candidate": asdict(NEW) | changes}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": f"Basic {TOKEN}"},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/admin/v1/adapters"),
        ("POST", "/admin/v1/adapters"),
        ("GET", "/admin/v1/adapters/pirate"),
        ("DELETE", "/admin/v1/adapters/pirate"),
        ("GET", "/admin/v1/adapters/pirate/history"),
        ("GET", "/admin/v1/history"),
        *(("POST", f"/admin/v1/adapters/pirate/{verb}") for verb in ("promote", "rollback", "abandon", "pin", "unpin")),
        ("GET", "/admin/v1/replicas"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
    ],
)
async def test_the_admin_api_needs_its_token(
    client: httpx.AsyncClient, method: str, path: str, headers: dict[str, str]
) -> None:
    response = await client.request(method, path, json=body(), headers=headers)

    assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_admin_token")


@pytest.mark.parametrize(
    ("changes", "status", "code", "message"),
    [
        pytest.param({"base": "c" * 64}, 422, "adapter_rejected", "made for the base model cccc", id="other-base"),
        pytest.param({"rank": 32}, 422, "adapter_rejected", "--max-lora-rank 32", id="rank"),
        pytest.param({"name": "small-llama"}, 422, "adapter_rejected", "name of the base model", id="base-name"),
        pytest.param({"revision": "d" * 64}, 503, "adapter_unavailable", "not in the adapter store", id="no-files"),
        pytest.param({"revision": "../../etc"}, 400, "invalid_body", "revision", id="path-as-revision"),
        pytest.param({"name": "a@b"}, 400, "invalid_body", "name", id="separator-in-name"),
        pytest.param({"path": "/etc"}, 400, "invalid_body", "path", id="unknown-field"),
    ],
)
async def test_a_candidate_that_cannot_be_served_is_refused_before_anything_is_recorded(
    client: httpx.AsyncClient, log: CatalogueLog, changes: dict[str, object], status: int, code: str, message: str
) -> None:
    epoch = log.read().epoch

    response = await client.post("/admin/v1/adapters", json=body(**changes), headers=ADMIN)

    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert message in response.json()["error"]["message"]
    assert log.read().epoch == epoch


async def test_a_retired_adapter_is_gone_for_new_requests_and_from_the_engine(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    retired = await client.delete("/admin/v1/adapters/pirate", headers=ADMIN)

    assert retired.json() == {"model": "pirate", "replicas": 1}
    assert (await client.post("/v1/completions", json={"model": "pirate"})).status_code == 404
    assert [model["id"] for model in (await client.get("/v1/models")).json()["data"]] == ["small-llama"]
    assert engine.resident == set()


async def test_retiring_what_is_not_there_is_reported(client: httpx.AsyncClient) -> None:
    response = await client.delete("/admin/v1/adapters/nobody", headers=ADMIN)

    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


async def test_replicas_are_listed_with_what_their_engines_hold(client: httpx.AsyncClient) -> None:
    response = await client.get("/admin/v1/replicas", headers=ADMIN)

    assert response.json() == {
        "replicas": [
            {
                "replica": "replica-1",
                "pool": "",
                "epoch": 2,
                "resident": [OLD.adapter.engine_name],
                "running_requests": 0,
                "waiting_requests": 0,
                "failures": {},
                "repairs": [],
                "address": None,
                "passed_on_requests": 0,
                "splits": {},
                "context_tokens": 64,
                "idle_s": 0.0,
            }
        ]
    }
