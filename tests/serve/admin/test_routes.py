"""The admin API, and vLLM's two calls on it, with real files and an engine that has none of a model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file

from serve.adapters.admission import Admission
from serve.adapters.pool import AdapterPool
from serve.adapters.publish import Control
from serve.adapters.reconcile import Reconciler
from serve.adapters.verification import RevisionVerifier
from serve.admin.routes import Admin
from serve.catalogue.adapter_store import AdapterStore
from serve.catalogue.log import CatalogueLog
from serve.catalogue.storage.object_store import DirectoryStore
from serve.gateway.app import Gateway
from serve.settings import AdmissionSettings, EngineSettings, GatewaySettings, ServeSettings
from serve.settings.admin_tokens import sha256
from tests.serve.conftest import BASE, write_adapter, write_base, write_weights
from tests.serve.fakes import FakeEngine
from tests.serve.one_replica import OneReplica

ADAPTERS = "/admin/v1/adapters"


@pytest.fixture
def roots(tmp_path: Path) -> Path:
    (tmp_path / "roots").mkdir()
    return tmp_path / "roots"


@pytest.fixture
async def client(
    engine: FakeEngine, log: CatalogueLog, roots: Path, tmp_path: Path
) -> AsyncIterator[httpx.AsyncClient]:
    write_base(tmp_path / "base", "base")
    settings = ServeSettings(
        engine=EngineSettings(model_path=tmp_path / "base", model_name="small", fingerprint=BASE, max_lora_rank=16),
        gateway=GatewaySettings(admin_tokens={"admin": sha256("secret"), "ci": sha256("other")}),
        admission=AdmissionSettings(adapter_roots=(roots,)),
        state_dir=tmp_path,
    )
    store = AdapterStore(tmp_path / "adapters", DirectoryStore(tmp_path))
    pool = AdapterPool(engine, store, capacity=8)
    verifier = RevisionVerifier(engine, store, settings.admission)
    reconciler = Reconciler("replica-1", log, engine, pool, verifier.verify)
    admission = Admission(lambda: [settings.engine], settings.admission)
    control = Control(log, OneReplica(reconciler))
    admin = Admin(settings.gateway.admin_tokens, settings.admission, admission, store, control)
    gateway = Gateway(settings, engine, pool, lambda: reconciler.catalogue, admin)
    transport = httpx.ASGITransport(gateway, raise_app_exceptions=False)
    headers = {"authorization": "Bearer secret"}
    async with httpx.AsyncClient(transport=transport, base_url="http://graft", headers=headers) as client:
        yield client


async def publish(client: httpx.AsyncClient, roots: Path, content: str, **body: object) -> httpx.Response:
    path = roots / content
    if not path.exists():
        write_adapter(path, content)
    return await client.post(ADAPTERS, json={"path": str(path), "name": "pirate"} | body)


async def ok(request: Any) -> Any:
    response = await request
    assert response.status_code == 200, response.text
    return response.json()


async def test_an_adapters_life_is_listed_and_shown(client: httpx.AsyncClient, roots: Path) -> None:
    first = await ok(publish(client, roots, "one"))
    second = await ok(publish(client, roots, "two", reason="nightly"))
    staged = await ok(publish(client, roots, "three", stage_only=True))
    digest = first["revision"].partition("@")[2]
    await ok(client.post(f"{ADAPTERS}/pirate/pin", json={"revision": digest}))
    await ok(
        client.post(f"{ADAPTERS}/pirate/rollback", json={"reason": "it swears"}, headers={"x-graft-caller": "ann"})
    )

    listed = await ok(client.get(ADAPTERS))
    shown = await ok(client.get(f"{ADAPTERS}/pirate"))
    history = (await ok(client.get(f"{ADAPTERS}/pirate/history")))["history"]

    assert listed["adapters"] == [
        {
            "name": "pirate", "current": first["revision"], "pool": None, "previous": None,
            "staged": [staged["revision"]], "pinned": [first["revision"]],
        }
    ]  # fmt: skip
    states = {revision["revision"]: revision["state"] for revision in shown["revisions"]}
    assert states == {first["revision"]: "serving", second["revision"]: "previous", staged["revision"]: "staged"}
    assert [entry["verb"] for entry in history] == ["rollback", "pin", "stage", "promote", "stage", "promote", "stage"]
    assert (history[0]["by"], history[0]["reason"]) == ("admin/ann", "it swears")
    assert history[3]["reason"] == "nightly"
    assert (await ok(client.get("/admin/v1/history?limit=1")))["history"] == history[:1]


async def test_every_change_is_signed_with_the_label_of_its_token(client: httpx.AsyncClient, roots: Path) -> None:
    headers = {"authorization": "Bearer other", "x-graft-caller": "bob\n<script>"}
    await ok(publish(client, roots, "one"))
    await ok(client.request("DELETE", f"{ADAPTERS}/pirate?reason=old", headers=headers))

    newest = (await ok(client.get("/admin/v1/history")))["history"][0]

    assert (newest["verb"], newest["by"], newest["reason"]) == ("retire", "ci/bobscript", "old")


async def test_a_staged_revision_is_promoted_or_abandoned(client: httpx.AsyncClient, roots: Path) -> None:
    await ok(publish(client, roots, "one"))
    staged = (await ok(publish(client, roots, "two", stage_only=True)))["revision"]
    body = {"revision": staged.partition("@")[2]}

    assert (await ok(client.post(f"{ADAPTERS}/pirate/promote", json=body)))["revision"] == staged
    refused = await client.post(f"{ADAPTERS}/pirate/abandon", json=body)

    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "transition_refused")


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", f"{ADAPTERS}/pirate/promote", {}, 400, "invalid_body"),
        ("POST", f"{ADAPTERS}/pirate/promote", {"revision": "x" * 12}, 400, "invalid_body"),
        ("POST", f"{ADAPTERS}/pirate/promote", {"revision": "0" * 12}, 404, "model_not_found"),
        ("POST", f"{ADAPTERS}/nobody/rollback", {}, 404, "model_not_found"),
        ("POST", f"{ADAPTERS}/pirate/rollback", {}, 409, "transition_refused"),
        ("POST", f"{ADAPTERS}/pirate/explode", {}, 404, "route_not_found"),
        ("GET", f"{ADAPTERS}/nobody", None, 404, "model_not_found"),
        ("GET", "/admin/v1/history?limit=-1", None, 400, "invalid_body"),
        ("GET", "/admin/v1/history?limit=99999", None, 400, "invalid_body"),
        ("POST", ADAPTERS, {}, 400, "invalid_body"),
        ("POST", ADAPTERS, {"path": "/etc"}, 403, "path_refused"),
        ("PUT", ADAPTERS, {}, 405, "method_not_allowed"),
    ],
)
async def test_a_call_that_does_not_fit_gets_an_error_in_the_same_shape(
    client: httpx.AsyncClient, roots: Path, method: str, path: str, body: object, status: int, code: str
) -> None:
    await ok(publish(client, roots, "one"))

    response = await client.request(method, path, json=body)

    assert (response.status_code, response.json()["error"]["code"]) == (status, code), response.text


async def test_a_bad_file_is_refused_before_anything_is_recorded(
    client: httpx.AsyncClient, roots: Path, log: CatalogueLog, engine: FakeEngine
) -> None:
    path = write_adapter(roots / "bad", "bad")
    tensors = load_file(path / "adapter_model.safetensors")
    write_weights(path, {name: tensor * np.float32(np.nan) for name, tensor in tensors.items()})

    response = await publish(client, roots, "bad")

    assert (response.status_code, response.json()["error"]["code"]) == (422, "adapter_rejected")
    assert "not a number" in response.json()["error"]["message"]
    assert (log.read().epoch, engine.loads) == (0, [])


async def test_a_rank_that_is_announced_too_small_is_refused(client: httpx.AsyncClient, roots: Path) -> None:
    first = await ok(publish(client, roots, "one"))
    digest = (await ok(client.get(f"{ADAPTERS}/pirate")))["revisions"][0]["digest"]
    candidate = {"name": "liar", "revision": digest, "base": BASE, "rank": 1}

    response = await client.post(ADAPTERS, json={"candidate": candidate})

    assert first["model"] == "pirate"
    assert response.json()["error"]["code"] == "adapter_rejected"
    assert "has rank 2, not 1" in response.json()["error"]["message"]


async def test_an_adapter_that_fails_its_proof_is_abandoned_with_the_reason(
    client: httpx.AsyncClient, roots: Path, engine: FakeEngine
) -> None:
    good = await ok(publish(client, roots, "one"))
    engine.adapters_say = -1.0  # as the base does

    response = await publish(client, roots, "two")

    assert (response.status_code, response.json()["error"]["code"]) == (409, "publish_failed")
    newest = (await ok(client.get(f"{ADAPTERS}/pirate")))["revisions"][0]
    assert newest["state"] == "abandoned"
    assert "Replica replica-1" in newest["reason"]
    assert "changes nothing" in newest["reason"]
    assert (await ok(client.get("/v1/models/pirate")))["root"] == good["revision"]


async def load(client: httpx.AsyncClient, **body: object) -> httpx.Response:
    return await client.post("/v1/load_lora_adapter", json=body)


async def test_vllms_calls_publish_and_retire(client: httpx.AsyncClient, roots: Path, log: CatalogueLog) -> None:
    path = str(write_adapter(roots / "one", "one"))

    loaded = await load(client, lora_name="pirate", lora_path=path)
    again = await load(client, lora_name="pirate", lora_path=path)
    other = str(write_adapter(roots / "two", "two"))
    replaced = await load(client, lora_name="pirate", lora_path=other, load_inplace=True)
    unloaded = await client.post("/v1/unload_lora_adapter", json={"lora_name": "pirate", "lora_int_id": 3})

    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'pirate' added successfully.")
    assert (again.status_code, again.json()["error"]["code"]) == (400, 400)
    assert "has already been loaded" in again.json()["error"]["message"]
    assert replaced.status_code == 200
    assert (unloaded.status_code, unloaded.text) == (200, "Success: LoRA adapter 'pirate' removed successfully.")
    assert [entry.verb for _, entry in log.history()] == ["retire", "promote", "stage", "promote", "stage"]
    assert log.history()[0][1].reason == "unload_lora_adapter of vLLM's API"


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"lora_name": "", "lora_path": "/x"}, 400, "must be provided"),
        ({"lora_name": "x", "lora_path": ""}, 400, "must be provided"),
        ({"lora_name": "small", "lora_path": "/x"}, 400, "conflicts with a served base model"),
        ({"lora_name": "Upper", "lora_path": "/x"}, 400, "can't be a name here"),
        ({"lora_name": "a/b", "lora_path": "/x"}, 400, "can't be a name here"),
        ({"lora_name": "x", "lora_path": "/etc"}, 403, "not below a directory"),
        ({"lora_name": "x"}, 400, "lora_path"),
    ],
)
async def test_vllms_load_refuses_what_it_must(
    client: httpx.AsyncClient, body: dict[str, str], status: int, message: str
) -> None:
    response = await load(client, **body)

    assert response.status_code == status
    assert message in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("directory", "status", "code"), [("nowhere", 403, "path_refused"), ("empty", 422, "adapter_rejected")]
)
async def test_vllms_load_of_what_is_no_adapter_has_the_code_of_graft(
    client: httpx.AsyncClient, roots: Path, directory: str, status: int, code: str
) -> None:
    (roots / "empty").mkdir(parents=True)

    response = await load(client, lora_name="pirate", lora_path=str(roots / directory))

    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


async def test_vllms_unload_of_what_is_not_there_is_not_found(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/unload_lora_adapter", json={"lora_name": "nobody"})

    assert response.status_code == 404
    assert response.json()["error"] == {
        "message": "The lora adapter 'nobody' cannot be found.", "type": "NotFoundError", "param": None, "code": 404,
    }  # fmt: skip
