"""One server with two pools: a 4-bit base with an adapter, and a merged model, each on an engine of its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from convert.artifact import Artifact
from examples.server import running_server
from serve.catalogue.state_dir import StateDir
from serve.follower.admin_client import AdminClient
from tests.convert import parts
from tests.e2e.conftest import ENGINE_OPTIONS, Server, Story, convert, reference_logprobs

BASE, MERGED = "tiny-llama", "german-merged"
NAMES = [MERGED, BASE, "french"]
PROMPT = [0, 17, 99, 140, 3, 250, 61, 8, 200, 33, 77, 5]
# The engine computes in bfloat16 (8 bits of mantissa), the reference in float32.
TOLERANCE_NATS = 0.15
RECOVERY_S = 240
LOST = 0  # in place of a status: the connection was closed
MERGE = ("--route", "merge", "--quantize", "none")


@pytest.fixture(scope="module")
def two_pools(story: Story, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("pools")
    convert(story.checkpoints["german"], story.base, home / "merged", "--name", MERGED, *MERGE)
    served = [story.artifacts["french"], home / "merged"]
    with running_server(served, home / "state", *ENGINE_OPTIONS, log=home / "server.log") as url:
        yield Server(url, home / "state")


@pytest.fixture(scope="module")
def trained(story: Story) -> dict[str, torch.Tensor]:
    """The functions as trained, by peft: the adapters unmerged on the dequantized 4-bit weights."""
    expected = {BASE: reference_logprobs(parts.dequantized_model(story.base), PROMPT)}
    for name, checkpoint in (("french", "french"), (MERGED, "german")):
        model = parts.with_adapter(parts.dequantized_model(story.base), story.checkpoints[checkpoint])
        expected[name] = reference_logprobs(model, PROMPT)
    return expected


@pytest.fixture(scope="module")
def client(two_pools: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{two_pools.url}/v1", api_key="none", max_retries=0)


def body_of(model: str, **fields: Any) -> dict[str, Any]:
    return {"model": model, "prompt": PROMPT, "max_tokens": 1, "temperature": 0} | fields


@pytest.mark.parametrize("model", NAMES)
def test_each_model_answers_at_one_address_with_the_function_that_was_trained(
    client: openai.OpenAI, trained: dict[str, torch.Tensor], model: str
) -> None:
    by_id = {"return_tokens_as_token_ids": True}
    completion = client.completions.create(**body_of(model, logprobs=5, extra_body=by_id))

    logprobs: Any = completion.choices[0].logprobs
    for token, logprob in logprobs.top_logprobs[0].items():
        expected = float(trained[model][int(token.removeprefix("token_id:"))])
        assert logprob == pytest.approx(expected, abs=TOLERANCE_NATS)


def test_the_models_of_both_pools_are_listed_and_no_other_is_found(client: openai.OpenAI) -> None:
    cards = {card.id: card.model_dump() for card in client.models.list()}

    assert list(cards) == NAMES
    assert [cards[name]["parent"] for name in NAMES] == [None, None, BASE]
    assert {cards[name]["max_model_len"] for name in NAMES} == {2048}
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="italian", prompt="ciao")
    assert caught.value.code == "model_not_found"


def test_a_stream_of_the_other_pool_arrives_whole(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(**body_of(MERGED, max_tokens=8), stream=True))
    unstreamed = client.completions.create(**body_of(MERGED, max_tokens=8))

    assert "".join(chunk.choices[0].text for chunk in chunks) == unstreamed.choices[0].text


def test_an_adapter_is_published_to_the_pool_of_its_base_model(
    two_pools: Server, story: Story, client: openai.OpenAI
) -> None:
    published = two_pools.command("publish", story.artifacts["french-2"])
    assert published.returncode == 0, published.stderr
    revision = Artifact.open(story.artifacts["french-2"]).manifest.adapter
    assert revision is not None

    answer = client.completions.create(**body_of("french"))

    assert answer.model == f"french@{revision.revision[:12]}"
    reports = AdminClient.of(StateDir(two_pools.state)).replicas()
    assert {report["pool"]: len(report["resident"]) for report in reports} == {BASE: 2, MERGED: 0}


def test_a_start_with_one_name_in_two_pools_is_refused(two_pools: Server, story: Story, tmp_path: Path) -> None:
    clash = tmp_path / "clash"
    convert(story.checkpoints["french"], story.base, clash, "--name", "french", *MERGE)

    result = Server(two_pools.url, tmp_path / "state").command("run", story.artifacts["french"], clash)

    assert result.returncode == 1
    assert "error[artifact_refused]" in result.stderr
    assert "the name 'french' is taken already" in result.stderr


def test_a_pool_whose_engine_is_killed_takes_no_request_of_the_other_one_with_it(two_pools: Server) -> None:
    statuses = asyncio.run(ask_while_killed(two_pools))

    assert set(statuses["french"]) == {200}
    assert set(statuses[MERGED]) <= {200, 503, LOST}
    assert statuses[MERGED].count(LOST) <= 1, "what ran in it when it was killed"
    assert statuses[MERGED][-1] == 200, "it came back"


async def ask_while_killed(two_pools: Server) -> dict[str, list[int]]:
    """The statuses of requests to both pools, from a kill of the merged model's engine until it answers again."""
    statuses: dict[str, list[int]] = {"french": [], MERGED: []}
    (replica,) = two_pools.actors(f"graft-{MERGED}:EngineReplica")
    is_back = asyncio.Event()

    async def ask(client: httpx.AsyncClient, model: str) -> None:
        while not is_back.is_set():
            try:
                response = await client.post(f"{two_pools.url}/v1/completions", json=body_of(model))
                statuses[model].append(response.status_code)
            except httpx.TransportError:
                statuses[model].append(LOST)
            if model == MERGED and statuses[model][-1] == 200 and {503, LOST} & set(statuses[model]):
                is_back.set()
            await asyncio.sleep(0.2)

    # A connection for each request: one that is kept may be closed while a request is on its way.
    one_by_one = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=60, limits=one_by_one) as client:
        tasks = [asyncio.create_task(ask(client, model)) for model in statuses]
        await asyncio.sleep(1)
        replica.kill()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(is_back.wait(), RECOVERY_S)
        is_back.set()
        await asyncio.gather(*tasks)
    return statuses
