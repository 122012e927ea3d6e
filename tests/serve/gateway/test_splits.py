"""Canaries and shadows, as callers of a gateway see them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from starlette.types import Receive, Scope, Send

from serve.catalogue.adapter_store import AdapterStore
from serve.catalogue.log import CatalogueLog
from serve.names import RequestedModel
from tests.serve.conftest import candidate
from tests.serve.fakes import FakeEngine, respond
from tests.serve.one_slot import (
    ADMIN,
    LIMITS,
    NEW,
    OLD,
    TURN_S,
    Replica,
    completion,
    published,
    replica,
    say_your_name,
    until,
)

__all__ = ["replica"]  # a fixture

# The limits below are parts of a second, which a busy machine needs for anything.
pytestmark = pytest.mark.virtual_time


async def test_a_canary_answers_its_callers_and_only_them(
    replica: Replica, engine: FakeEngine, log: CatalogueLog
) -> None:
    await published(replica, log)
    engine.handler = say_your_name
    async with replica.client() as client:
        begun = await client.post(
            "/admin/v1/adapters/pirate/canary", json={"revision": OLD.revision[:12], "share": 0.5}, headers=ADMIN
        )
        assert begun.status_code == 200, begun.text
        answers: dict[str, set[str]] = {}
        for number in range(60):
            caller = f"caller-{number % 20}"
            answer = await client.post(
                "/v1/completions", json={"model": "pirate"}, headers={"authorization": f"Bearer {caller}"}
            )
            assert answer.headers["x-graft-model"] == answer.json()["choices"][0]["text"]
            answers.setdefault(caller, set()).add(answer.json()["choices"][0]["text"])
        ended = await client.delete("/admin/v1/adapters/pirate/canary", headers=ADMIN)
        after = await client.post("/v1/completions", json={"model": "pirate"})

    assert all(len(revisions) == 1 for revisions in answers.values()), "each caller stays on its side"
    assert set().union(*answers.values()) == {OLD.adapter.engine_name, NEW.adapter.engine_name}
    assert ended.json() == {"model": "pirate", "ended": "canary", "replicas": 1}
    assert after.json()["choices"][0]["text"] == NEW.adapter.engine_name
    assert engine.resident == {NEW.adapter}


async def test_a_canary_that_fails_ends_by_itself(replica: Replica, engine: FakeEngine, log: CatalogueLog) -> None:
    await published(replica, log)

    async def fail_on_old(scope: Scope, receive: Receive, send: Send) -> None:
        model = json.loads((await receive())["body"])["model"]
        await respond(send, 500 if model == OLD.adapter.engine_name else 200, completion(model))

    engine.handler = fail_on_old
    terms = {"revision": OLD.revision, "share": 0.5, "min_requests": 10}
    async with replica.client() as client:
        await client.post("/admin/v1/adapters/pirate/canary", json=terms, headers=ADMIN)

        async def statuses(callers: range) -> list[int]:
            headers = [{"x-graft-caller": f"caller-{number}"} for number in callers]
            answers = [
                await client.post("/v1/completions", json={"model": "pirate"}, headers=header) for header in headers
            ]
            return [answer.status_code for answer in answers]

        assert 500 in await statuses(range(40))
        await until(lambda: replica.reconciler.catalogue.split_of("pirate") is None)
        assert set(await statuses(range(40))) == {200}

    assert log.read().split_of("pirate") is None
    assert log.read().resolve(RequestedModel("pirate")) == NEW.adapter
    assert engine.resident == {NEW.adapter}


async def test_a_shadow_is_compared_and_seen_by_nobody(replica: Replica, engine: FakeEngine, log: CatalogueLog) -> None:
    await published(replica, log)

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        fields = json.loads((await receive())["body"])
        ending = "saffron" if fields["model"] == OLD.adapter.engine_name and fields["prompt"] % 2 else "marmalade"
        await asyncio.sleep(TURN_S)
        await respond(send, 200, completion(f"The word is {ending}"))

    engine.handler = answer
    async with replica.client() as client:
        await client.post(
            "/admin/v1/adapters/pirate/shadow", json={"revision": OLD.revision, "share": 1}, headers=ADMIN
        )
        texts = set()
        for number in range(10):
            response = await client.post("/v1/completions", json={"model": "pirate", "prompt": number})
            texts.add(response.json()["choices"][0]["text"])
            await until(lambda number=number: replica.rollouts.summaries()["pirate"]["compared"] == number + 1)
        report = (await client.get("/admin/v1/replicas", headers=ADMIN)).json()["replicas"][0]["splits"]["pirate"]

    assert texts == {"The word is marmalade"}
    assert (report["kind"], report["compared"], report["same"], report["dropped"]) == ("shadow", 10, 5, 0)
    assert (report["agreeing_words"], report["words"]) == (5 * 4 + 5 * 3, 40)


async def test_a_copy_for_a_shadow_has_the_output_limit_of_the_callers_request(
    engine: FakeEngine, store: AdapterStore, tmp_path: Path, log: CatalogueLog
) -> None:
    replica = Replica(engine, store, tmp_path, log, LIMITS, max_output_tokens=8)
    await published(replica, log)

    async def say_as_much_as_may_be(scope: Scope, receive: Receive, send: Send) -> None:
        fields = json.loads((await receive())["body"])
        await asyncio.sleep(TURN_S)
        await respond(send, 200, completion("word " * fields.get("max_tokens", 100)))

    engine.handler = say_as_much_as_may_be
    async with replica.client() as client:
        await client.post(
            "/admin/v1/adapters/pirate/shadow", json={"revision": OLD.revision, "share": 1}, headers=ADMIN
        )
        await client.post("/v1/completions", json={"model": "pirate"})
        await until(lambda: replica.rollouts.summaries()["pirate"]["compared"] == 1)

    summary = replica.rollouts.summaries()["pirate"]
    assert (summary["same"], summary["words"]) == (1, 8)


async def test_a_shadow_is_dropped_where_a_user_would_wait_for_it(
    replica: Replica, engine: FakeEngine, log: CatalogueLog
) -> None:
    await published(replica, log)
    other = candidate("json", "w")
    log.stage(other)
    log.promote(other)
    left = asyncio.Event()

    async def hang_on_old(scope: Scope, receive: Receive, send: Send) -> None:
        model = json.loads((await receive())["body"])["model"]
        if model == OLD.adapter.engine_name:
            assert await receive() == {"type": "http.disconnect"}
            left.set()
        else:
            await asyncio.sleep(TURN_S)
            await respond(send, 200, completion(model))

    engine.handler = hang_on_old
    async with replica.client() as client:
        await client.post(
            "/admin/v1/adapters/pirate/shadow", json={"revision": OLD.revision, "share": 1}, headers=ADMIN
        )
        await client.post("/v1/completions", json={"model": "pirate"})
        await until(lambda: OLD.adapter in replica.pool.slots.running_adapters)
        answer = await client.post("/v1/completions", json={"model": "json"})

    assert answer.status_code == 200, "the only slot was the shadow's until a user came"
    assert left.is_set()
    assert replica.rollouts.summaries()["pirate"]["dropped"] == 1


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        pytest.param({"revision": NEW.revision}, 409, "split_refused", id="what-it-means-already"),
        pytest.param({"revision": "0" * 12}, 409, "split_refused", id="unknown"),
        pytest.param({"revision": "../../etc"}, 400, "invalid_body", id="no-revision"),
        pytest.param({"revision": OLD.revision, "share": 2}, 400, "invalid_body", id="share"),
        pytest.param({}, 400, "invalid_body", id="empty"),
    ],
)
async def test_a_split_that_can_not_be_is_refused(
    replica: Replica, log: CatalogueLog, body: dict[str, object], status: int, code: str
) -> None:
    await published(replica, log)

    async with replica.client() as client:
        for kind in ("canary", "shadow"):
            response = await client.post(f"/admin/v1/adapters/pirate/{kind}", json=body, headers=ADMIN)
            assert (response.status_code, response.json()["error"]["code"]) == (status, code)
            assert (await client.post(f"/admin/v1/adapters/pirate/{kind}", json=body)).status_code == 401
            missing = await client.delete(f"/admin/v1/adapters/pirate/{kind}", headers=ADMIN)
            assert (missing.status_code, missing.json()["error"]["code"]) == (409, "split_refused")
