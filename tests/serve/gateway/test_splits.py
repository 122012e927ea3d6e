"""Many adapters, few slots: what callers of a gateway see, with an engine that has no model."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from serve.admin import Admin
from serve.catalogue import Catalogue
from serve.config import EngineSettings, GatewaySettings, ServeSettings
from serve.entry import Cause, Entry
from serve.gateway import Gateway
from serve.log import CatalogueLog
from serve.names import RequestedModel
from serve.publish import Control
from serve.reconcile import Reconciler
from serve.residency import AdapterPool
from serve.rollout import Rollouts
from serve.state import sha256
from serve.store import AdapterStore
from serve.waiting import WaitLimits
from tests.serve.conftest import believe, candidate
from tests.serve.fakes import FakeEngine, respond
from tests.serve.one_replica import OneReplica, Unchecked

TOKEN = "the admin token"
ADMIN = {"authorization": f"Bearer {TOKEN}"}
OLD, NEW = candidate("pirate", "old"), candidate("pirate", "new")


def registered(count: int) -> Catalogue:
    """So many aliases, each published once."""
    adapters = [candidate(f"adapter-{number:05}", "w") for number in range(count)]
    return Catalogue().after(
        *(Entry.now(verb, adapter, Cause()) for adapter in adapters for verb in ("stage", "promote"))  # type: ignore[arg-type]
    )


class Replica:
    def __init__(self, engine: FakeEngine, store: AdapterStore, root: Path, log: CatalogueLog, limits: WaitLimits):
        self.engine = engine
        self.pool = AdapterPool(engine, store, capacity=3, slots=1, limits=limits)
        self.rollouts = Rollouts(self._give_up)
        self.reconciler = Reconciler(
            "replica-1", log, engine, self.pool, believe, keep_previous=0, splits=self.rollouts.summaries
        )
        settings = ServeSettings(
            engine=EngineSettings(model_path=root, model_name="small-llama", fingerprint="b" * 64),
            gateway=GatewaySettings(admin_tokens={"admin": sha256(TOKEN)}),
            state_dir=root,
        )
        self.admin = Admin(
            settings.gateway.admin_tokens,
            settings.engine,
            settings.admission,
            Unchecked(settings.engine, settings.admission),
            store,
            Control(log, OneReplica(self.reconciler)),
        )
        self.gateway = Gateway(
            settings, engine, self.pool, lambda: self.reconciler.catalogue, self.admin, self.rollouts
        )

    async def _give_up(self, *args: object) -> None:
        await self.admin.give_up(*args)  # type: ignore[arg-type]

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(self.gateway, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://graft", timeout=30) as client:
            yield client


@pytest.fixture
def replica(engine: FakeEngine, store: AdapterStore, tmp_path: Path, log: CatalogueLog) -> Replica:
    limits = WaitLimits(max_waiting=4, max_waiting_per_caller=2, max_wait_s=0.3, turn_s=0.05)
    return Replica(engine, store, tmp_path, log, limits)


async def until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not happened():  # noqa: ASYNC110  (whatever it is, it has no event)
            await asyncio.sleep(0.001)


def completion(text: str) -> bytes:
    return json.dumps({"choices": [{"text": text}]}).encode()


async def say_your_name(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the engine name it was asked for, after a moment."""
    model = json.loads((await receive())["body"])["model"]
    await asyncio.sleep(0.005)
    await respond(send, 200, completion(model))


async def test_a_thousand_adapters_are_registered_and_only_what_fits_is_loaded(
    replica: Replica, engine: FakeEngine
) -> None:
    replica.reconciler.log.follow = lambda _: registered(1000)  # type: ignore[method-assign]

    await replica.reconciler.sync()

    assert len(engine.loads) == 3
    assert {it.name for it in engine.resident} == {"adapter-00997", "adapter-00998", "adapter-00999"}, "the newest"
    async with replica.client() as client:
        assert len((await client.get("/v1/models")).json()["data"]) == 1001
        assert (await client.get("/v1/models/adapter-00500")).status_code == 200
        unknown = (await client.post("/v1/completions", json={"model": "nobody"})).json()["error"]["message"]
    assert len(unknown) < 1000
    assert "more: see GET /v1/models" in unknown


async def test_each_of_a_thousand_answers_as_itself_under_churn(replica: Replica, engine: FakeEngine) -> None:
    replica = Replica(engine, replica.pool._store, Path(), replica.reconciler.log, WaitLimits(2000, 2000, 60, 0.01))
    replica.reconciler.catalogue = catalogue = registered(1000)
    engine.handler = say_your_name
    expected = {adapter.name: adapter.engine_name for adapter in catalogue.current}

    async with replica.client() as client:
        names = [f"adapter-{number * 7 % 1000:05}" for number in range(150)] * 2
        answers = await asyncio.gather(*(client.post("/v1/completions", json={"model": name}) for name in names))

    assert [answer.json()["choices"][0]["text"] for answer in answers] == [expected[name] for name in names]
    assert len(engine.resident) <= 3
    assert Counter(engine.loads).most_common(1)[0][1] == 1, "requests for one adapter were served by one load"


async def test_who_waits_too_long_or_too_many_is_told_when_to_come_back(replica: Replica, engine: FakeEngine) -> None:
    replica.reconciler.catalogue = registered(5)
    finish = asyncio.Event()

    async def hang(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await finish.wait()
        await respond(send, 200, completion("at last"))

    engine.handler = hang

    async with replica.client() as client:

        async def ask(number: int, caller: str) -> httpx.Response:
            return await client.post(
                "/v1/completions", json={"model": f"adapter-{number:05}"}, headers={"x-graft-caller": caller}
            )

        running = asyncio.create_task(ask(0, "first"))
        await until(lambda: bool(replica.pool.turns.running_adapters))
        waiting = [asyncio.create_task(ask(number, str(number))) for number in (1, 2, 3)]
        waiting.append(asyncio.create_task(ask(1, "1")))
        await until(lambda: replica.pool.turns.waiting == 4)
        of_greedy, of_another = await ask(2, "1"), await ask(2, "another")
        assert replica.pool.turns.waiting == 4, "they were refused while the others still waited"
        gave_up = await asyncio.gather(*waiting)
        finish.set()
        assert (await running).status_code == 200

    for response, status, code in [
        (of_greedy, 429, "caller_queue_full"),
        (of_another, 503, "adapter_queue_full"),
        *((it, 503, "adapter_wait_too_long") for it in gave_up),
    ]:
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)
        assert int(response.headers["retry-after"]) >= 1


async def published(replica: Replica, log: CatalogueLog) -> None:
    """`pirate` is NEW, and was OLD."""
    for adapter in (OLD, NEW):
        log.stage(adapter)
        log.promote(adapter)
    await replica.reconciler.sync()


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
        told: dict[str, set[str]] = {}
        for number in range(60):
            caller = f"caller-{number % 20}"
            answer = await client.post(
                "/v1/completions", json={"model": "pirate"}, headers={"authorization": f"Bearer {caller}"}
            )
            assert answer.headers["x-graft-model"] == answer.json()["choices"][0]["text"]
            told.setdefault(caller, set()).add(answer.json()["choices"][0]["text"])
        ended = await client.delete("/admin/v1/adapters/pirate/canary", headers=ADMIN)
        after = await client.post("/v1/completions", json={"model": "pirate"})

    assert all(len(revisions) == 1 for revisions in told.values()), "each caller stays on its side"
    assert set().union(*told.values()) == {OLD.adapter.engine_name, NEW.adapter.engine_name}
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
            answers = [await client.post("/v1/completions", json={"model": "pirate"}, headers=it) for it in headers]
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
        await respond(send, 200, completion(f"The word is {ending}"))

    engine.handler = answer
    async with replica.client() as client:
        await client.post(
            "/admin/v1/adapters/pirate/shadow", json={"revision": OLD.revision, "share": 1}, headers=ADMIN
        )
        told = set()
        for number in range(10):
            response = await client.post("/v1/completions", json={"model": "pirate", "prompt": number})
            told.add(response.json()["choices"][0]["text"])
            await until(lambda number=number: replica.rollouts.summaries()["pirate"]["compared"] == number + 1)
        report = (await client.get("/admin/v1/replicas", headers=ADMIN)).json()["replicas"][0]["splits"]["pirate"]

    assert told == {"The word is marmalade"}
    assert (report["kind"], report["compared"], report["same"], report["dropped"]) == ("shadow", 10, 5, 0)
    assert (report["agreeing_words"], report["words"]) == (5 * 4 + 5 * 3, 40)


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
            await respond(send, 200, completion(model))

    engine.handler = hang_on_old
    async with replica.client() as client:
        await client.post(
            "/admin/v1/adapters/pirate/shadow", json={"revision": OLD.revision, "share": 1}, headers=ADMIN
        )
        await client.post("/v1/completions", json={"model": "pirate"})
        await until(lambda: OLD.adapter in replica.pool.turns.running_adapters)
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
