"""Three times as many adapters as an engine holds, on real engines: each answers as itself, nobody is left out."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from typing import Any

import httpx
import pytest

from convert.artifact import Artifact
from serve.adapters.ingest import ingest_artifact
from serve.catalogue.candidate import Candidate
from serve.catalogue.state_dir import StateDir
from serve.gateway.routing.peers import MAX_REPORT_AGE_S
from tests.e2e.conftest import REPLICAS, RESIDENT, Server, Story

QUESTION = "the rain in spain"
NAMES = [f"{kind}-{number}" for number in range(6) for kind in ("french", "german")]
ROUNDS = 6


@dataclass(frozen=True)
class Operator:
    """The admin API, for many calls in a row."""

    http: httpx.AsyncClient

    async def publish(self, candidate: Candidate) -> dict[str, Any]:
        return await self._answer("POST", "/admin/v1/adapters", {"candidate": asdict(candidate)})

    async def retire(self, name: str) -> dict[str, Any]:
        return await self._answer("DELETE", f"/admin/v1/adapters/{name}")

    async def split(self, name: str, kind: str, **terms: Any) -> dict[str, Any]:
        return await self._answer("POST", f"/admin/v1/adapters/{name}/{kind}", terms)

    async def end(self, name: str, kind: str) -> dict[str, Any]:
        return await self._answer("DELETE", f"/admin/v1/adapters/{name}/{kind}")

    async def replicas(self) -> list[dict[str, Any]]:
        replicas: list[dict[str, Any]] = (await self._answer("GET", "/admin/v1/replicas"))["replicas"]
        return replicas

    async def _answer(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        response = await self.http.request(method, path, json=body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer


@contextlib.asynccontextmanager
async def operating(server: Server) -> AsyncIterator[Operator]:
    headers = {"authorization": f"Bearer {StateDir(server.state).admin_token()}"}
    async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=120) as client:
        yield Operator(client)


def candidate(story: Story, artifact: str, name: str) -> Candidate:
    built = Candidate.of(Artifact.open(story.artifacts[artifact]).manifest, name)
    assert built is not None
    return built


async def ask(client: httpx.AsyncClient, model: str, **headers: str) -> dict[str, Any]:
    request = {"model": model, "prompt": QUESTION, "max_tokens": 8, "temperature": 0}
    response = await client.post("/v1/completions", json=request, headers=headers)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def text_of(answer: dict[str, Any]) -> str:
    text: str = answer["choices"][0]["text"]
    return text


@pytest.fixture
async def many(server: Server, story: Story) -> AsyncIterator[Operator]:
    """Twelve names for two adapters; the files are in the store already."""
    async with operating(server) as operator:
        for name in NAMES:
            await operator.publish(candidate(story, name.partition("-")[0], name))
        yield operator
        for name in NAMES:
            await operator.retire(name)


async def test_every_adapter_answers_as_itself_while_they_push_each_other_out(server: Server, many: Operator) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:
        expected = {kind: text_of(await ask(client, kind)) for kind in ("french", "german")}
        assert expected["french"] != expected["german"]
        models = NAMES * ROUNDS

        answers = await asyncio.gather(*(ask(client, model) for model in models))

    for model, answer in zip(models, answers, strict=True):
        assert answer["model"].startswith(f"{model}@")
        assert text_of(answer) == expected[model.partition("-")[0]]
    reports = await many.replicas()
    assert len(reports) == REPLICAS
    for report in reports:
        assert len(report["resident"]) <= RESIDENT, "the engine never holds more than the pool decided"
        assert report["waiting_requests"] == 0


async def test_a_cold_request_is_answered_by_the_replica_that_holds_its_adapter(server: Server, many: Operator) -> None:
    before = sum(report["passed_on_requests"] for report in await many.replicas())
    for name in NAMES[:4]:  # the first ones were pushed out again by the last ones, on both
        for number in range(5):
            # A connection of its own each, so that the proxy takes the replicas in turn.
            async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:
                assert (await ask(client, name))["model"].startswith(f"{name}@")
            if number == 0:
                await asyncio.sleep(MAX_REPORT_AGE_S)  # what it loaded just now, the other one does not know yet

    reports = await many.replicas()
    assert all(report["address"] for report in reports)
    assert sum(report["passed_on_requests"] for report in reports) > before


@pytest.fixture
def stored(server: Server, story: Story) -> None:
    """The files of both revisions of `french` are in the store."""
    for artifact in ("french", "french-2"):
        ingest_artifact(Artifact.open(story.artifacts[artifact]), None, StateDir(server.state).store)


@pytest.mark.usefixtures("stored")
async def test_callers_of_a_canary_stay_on_its_side_on_every_replica(server: Server, story: Story) -> None:
    second = candidate(story, "french-2", "french").adapter
    async with operating(server) as operator, httpx.AsyncClient(base_url=server.url, timeout=300) as client:
        await operator.publish(candidate(story, "french-2", "french"))
        await operator.publish(candidate(story, "french", "french"))
        begun = await operator.split("french", "canary", revision=second.revision, share=0.5)
        assert begun["replicas"] == REPLICAS
        callers = [f"caller-{number % 12}" for number in range(48)]
        answers = await asyncio.gather(*(ask(client, "french", **{"x-graft-caller": caller}) for caller in callers))
        await operator.end("french", "canary")
        after = {(await ask(client, "french", **{"x-graft-caller": caller}))["model"] for caller in callers[:12]}

    sides: dict[str, set[str]] = {}
    for caller, answer in zip(callers, answers, strict=True):
        sides.setdefault(caller, set()).add(answer["model"])
    stable = candidate(story, "french", "french").adapter
    assert all(len(side) == 1 for side in sides.values())
    assert set().union(*sides.values()) == {second.engine_name, stable.engine_name}
    assert after == {stable.engine_name}


@pytest.mark.usefixtures("stored")
async def test_a_shadow_is_compared_on_real_answers(server: Server, story: Story) -> None:
    shadow = candidate(story, "french-2", "french").adapter
    async with operating(server) as operator, httpx.AsyncClient(base_url=server.url, timeout=300) as client:
        await operator.publish(candidate(story, "french-2", "french"))
        await operator.publish(candidate(story, "french", "french"))
        await operator.split("french", "shadow", revision=shadow.revision, share=1)
        models = {(await ask(client, "french"))["model"] for _ in range(6)}
        async with asyncio.timeout(60):
            while await compared_or_dropped(operator) < 6:  # noqa: ASYNC110  (the replicas have no event for it)
                await asyncio.sleep(0.1)
        splits = [report["splits"]["french"] for report in await operator.replicas() if report["splits"]]
        await operator.end("french", "shadow")

    assert models == {candidate(story, "french", "french").adapter.engine_name}
    assert sum(split["compared"] for split in splits) >= 1
    assert sum(split["same"] for split in splits) == 0, "the two revisions say different things"


async def compared_or_dropped(operator: Operator) -> int:
    splits = [split for report in await operator.replicas() for split in report["splits"].values()]
    return sum(split["compared"] + split["dropped"] for split in splits)


def test_a_canary_begins_and_ends_on_the_command_line(server: Server, story: Story) -> None:
    for artifact in ("french-2", "french"):
        assert server.command("publish", story.artifacts[artifact]).returncode == 0
    revision = candidate(story, "french-2", "french").revision

    begun = server.command("canary", "french", revision[:12], "--share", "0.25", "--json")
    ended = server.command("canary", "french", "--end")
    again = server.command("canary", "french", "--end")

    assert json.loads(begun.stdout)["share"] == 0.25, begun.stderr
    assert ended.returncode == 0, ended.stderr
    assert "error[split_refused]" in again.stderr
