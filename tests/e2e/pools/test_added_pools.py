"""A server that was started with one pool gets others and loses them, while the first one answers without a failure."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from convert.artifact import Artifact
from examples.server import running_server
from serve.catalogue.added_pool import AddedPool
from serve.catalogue.entry import Audit
from serve.catalogue.pool_changes import add_pool
from serve.catalogue.state_dir import StateDir
from serve.follower.admin_client import AdminClient
from tests.convert import parts
from tests.e2e.conftest import ENGINE_OPTIONS, Server, Story, convert, reference_logprobs
from tests.e2e.pools.running import READY_S, asking, pools_of, until_status, wait_for_state
from tests.e2e.pools.test_pools import MERGE, PROMPT, TOLERANCE_NATS, body_of

MERGED, BROKEN, SLEEPER = "german-merged", "broken", "sleeper"
MOVES = 5
OWN_LENGTH = 48  # of a pool that has it of its own
LARGE = 100_000  # bytes; HAProxy holds 64 KiB


@pytest.fixture(scope="module")
def artifacts(story: Story, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that the server takes artifacts from."""
    root = tmp_path_factory.mktemp("artifacts")
    convert(story.checkpoints["german"], story.base, root / MERGED, "--name", MERGED, *MERGE)
    return root


@pytest.fixture(scope="module")
def pools(story: Story, artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """It was added a pool before it started; of another one that it was added, the model is gone."""
    home = tmp_path_factory.mktemp("added")
    state = StateDir(home / "state")
    state.prepare()
    for name, base in ((MERGED, Artifact.open(artifacts / MERGED).manifest.model.fingerprint), (BROKEN, "b" * 64)):
        pool = AddedPool(name=name, base=base, model_path=artifacts / name / "model", max_lora_rank=0)
        add_pool(state.log, pool, [], Audit("somebody", "before the start"))
    options = (*ENGINE_OPTIONS, "--artifact-root", str(artifacts))
    with running_server([story.artifacts["french"]], home / "state", *options, log=home / "server.log") as url:
        yield Server(url, home / "state")


@pytest.fixture(scope="module")
def client(pools: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{pools.url}/v1", api_key="none", max_retries=0)


def test_pools_that_were_added_before_come_back_and_one_that_cannot_start_keeps_no_other_from_it(
    pools: Server, client: openai.OpenAI
) -> None:
    assert client.completions.create(**body_of("french")).choices, "at once: the start waits for no added pool"
    ready = wait_for_state(pools, MERGED, "running")
    broken = wait_for_state(pools, BROKEN, "failed")

    assert (ready["ready"], ready["added"], ready["kind"]) == (1, True, "merged model")
    assert str(Path(BROKEN) / "model") in broken["reason"]
    assert client.completions.create(**body_of(MERGED)).model == MERGED
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(**body_of(BROKEN))
    assert caught.value.response.status_code == 503
    assert caught.value.response.headers["retry-after"] == "1"
    assert pools.command("pool", "remove", BROKEN).returncode == 0
    assert BROKEN not in pools_of(pools)


def test_a_pool_is_removed_and_added_while_another_one_answers_every_request(
    pools: Server, story: Story, artifacts: Path, client: openai.OpenAI
) -> None:
    engines = {process.pid for process in pools.actors("ServeReplica:graft:EngineReplica")}

    asked = asyncio.run(remove_and_add(pools, artifacts))

    assert len(asked) > 50
    assert set(asked) == {200}
    assert {process.pid for process in pools.actors("ServeReplica:graft:EngineReplica")} == engines, "none restarted"
    long = {"prompt": list(range(OWN_LENGTH + 1))}
    with pytest.raises(openai.BadRequestError, match=f"context length is {OWN_LENGTH}"):
        client.completions.create(**body_of(MERGED, **long))
    assert client.completions.create(**body_of("french", **long)).choices, "the others keep theirs"
    by_id = {"return_tokens_as_token_ids": True}
    logprobs: Any = client.completions.create(**body_of(MERGED, logprobs=5, extra_body=by_id)).choices[0].logprobs
    trained = parts.with_adapter(parts.dequantized_model(story.base), story.checkpoints["german"])
    expected = reference_logprobs(trained, PROMPT)
    for token, logprob in logprobs.top_logprobs[0].items():
        assert logprob == pytest.approx(float(expected[int(token.removeprefix("token_id:"))]), abs=TOLERANCE_NATS)


async def remove_and_add(pools: Server, artifacts: Path) -> list[int]:
    """The statuses of requests for the first pool meanwhile."""
    async with asking(pools) as statuses:
        file = artifacts / "graft.yaml"
        file.write_text("adapters: []\nremove_other_pools: true\n")
        removed = await asyncio.to_thread(pools.command, "apply", file)
        assert removed.returncode == 0, removed.stderr
        assert f"remove pool {MERGED}" in removed.stderr
        await until_status(pools, MERGED, 404)
        own = f"--vllm-arg=--max-model-len={OWN_LENGTH}"
        added = await asyncio.to_thread(pools.command, "pool", "add", artifacts / MERGED, own)
        assert added.returncode == 0, added.stderr
        assert f"{MERGED} answers (1 engine)" in added.stderr
        await until_status(pools, MERGED, 200)
        listed = f"  - artifact: {MERGED}\n    vllm_args: [--max-model-len={OWN_LENGTH}]\n"
        file.write_text(f"adapters: []\nremove_other_pools: true\npools:\n{listed}")
        applied = await asyncio.to_thread(pools.command, "apply", file)
        assert "Nothing to change." in applied.stderr
    return statuses


def test_an_added_pool_is_listed_and_answers_what_the_proxy_could_not_send_to_it(
    pools: Server, client: openai.OpenAI
) -> None:
    assert {card.id for card in client.models.list()} == {"tiny-llama", "french", MERGED}
    large = {"prompt": PROMPT, "max_tokens": 1, "user": "x" * LARGE, "model": MERGED}
    response = httpx.post(f"{pools.url}/v1/completions", json=large, timeout=60)
    assert (response.status_code, response.json()["model"]) == (200, MERGED)
    assert httpx.get(f"{pools.url}/health/{MERGED}").status_code == 200
    entries = json.loads(pools.command("history", "--json").stdout)["history"]
    assert [(entry["verb"], entry["revision"]) for entry in entries if "pool" in entry["verb"]][:2] == [
        ("add_pool", MERGED),
        ("remove_pool", MERGED),
    ]


def test_a_name_moves_to_its_merged_twin_and_back_under_load_with_no_failed_and_no_mixed_answer(
    pools: Server, story: Story
) -> None:
    published = pools.command("publish", story.artifacts["german"])
    assert published.returncode == 0, published.stderr
    adapter = Artifact.open(story.artifacts["german"]).manifest.adapter
    assert adapter is not None
    forms = {f"german@{adapter.revision[:12]}", MERGED}

    statuses, seen = asyncio.run(move_under_load(pools))

    assert set(statuses) == {200}
    assert len(statuses) > 50
    assert {model for model, _ in seen} == forms, "both answered"
    assert all(header == model for header, model in seen), "the header and the answer name one form"
    refused = pools.command("move", "german", "tiny-llama")
    assert "is the base model of german" in refused.stderr
    other = pools.command("move", "french", MERGED)
    assert "was made of another checkpoint" in other.stderr.replace("\n", " ")


async def move_under_load(pools: Server) -> tuple[list[int], set[tuple[str, str]]]:
    """The statuses of requests for the name during moves, and what answered: by header and by body."""
    admin, statuses, seen = AdminClient.of(StateDir(pools.state)), [], set()
    is_over = asyncio.Event()

    async def ask(client: httpx.AsyncClient) -> None:
        while not is_over.is_set():
            response = await client.post(f"{pools.url}/v1/completions", json=body_of("german", max_tokens=4))
            statuses.append(response.status_code)
            seen.add((response.headers.get("x-graft-model", ""), response.json().get("model", "")))

    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_keepalive_connections=0)) as client:
        tasks = [asyncio.create_task(ask(client)) for _ in range(3)]
        for _ in range(MOVES):
            moved = await asyncio.to_thread(admin.move, "german", MERGED)
            assert moved["replicas"] == 2
            await asyncio.sleep(0.5)
            await asyncio.to_thread(admin.roll_back, "german", None)
            await asyncio.sleep(0.5)
        is_over.set()
        await asyncio.gather(*tasks)
    return statuses, seen


def test_a_pool_that_nobody_asks_is_stopped_and_requests_that_come_then_wait_until_it_answers(
    pools: Server, story: Story, artifacts: Path
) -> None:
    convert(story.checkpoints["french"], story.base, artifacts / SLEEPER, "--name", SLEEPER, *MERGE)

    first, woken = asyncio.run(sleep_and_wake(pools, artifacts))

    assert len(first) > 50
    assert set(first) == {200}, "the other pools answer throughout"
    assert [response.status_code for response in woken] == [200] * len(woken)
    assert {response.headers["x-graft-model"] for response in woken} == {SLEEPER}
    entries = json.loads(pools.command("history", "--json").stdout)["history"]
    of_sleeper = [(entry["verb"], entry["by"]) for entry in reversed(entries) if entry["revision"] == SLEEPER]
    assert [verb for verb, _ in of_sleeper][:3] == ["add_pool", "sleep_pool", "wake_pool"]
    assert {by for _, by in of_sleeper[1:3]} == {"graft"}
    wait_for_state(pools, SLEEPER, "asleep")
    assert pools.command("pool", "remove", SLEEPER).returncode == 0


async def sleep_and_wake(pools: Server, artifacts: Path) -> tuple[list[int], list[httpx.Response]]:
    """The statuses of requests for the first pool meanwhile, and the answers to those that found the pool asleep."""
    async with asking(pools) as statuses, httpx.AsyncClient(timeout=READY_S) as client:
        added = await asyncio.to_thread(pools.command, "pool", "add", artifacts / SLEEPER, "--sleep-after", "5")
        assert added.returncode == 0, added.stderr
        await asyncio.to_thread(wait_for_state, pools, SLEEPER, "asleep")
        deadline = time.monotonic() + READY_S
        while pools.actors(f"ServeReplica:graft-{SLEEPER}:EngineReplica"):
            assert time.monotonic() < deadline, "its engine is stopped"
            await asyncio.sleep(0.5)
        assert (await client.get(f"{pools.url}/health/{SLEEPER}")).status_code == 200
        log = (pools.state.parent / "server.log").read_text()
        metrics = (await client.get(log.rpartition("Prometheus: ")[2].split()[0])).text
        up = [line for line in metrics.splitlines() if line.startswith("graft_replica_up{")]
        assert up, metrics[:500]
        assert not any(f'model_name="{SLEEPER}"' in line for line in up), "it is not missed by an alert"
        requests = [client.post(f"{pools.url}/v1/completions", json=body_of(SLEEPER)) for _ in range(4)]
        late = asyncio.create_task(late_request(client, pools))
        woken = [*await asyncio.gather(*requests), await late]
        await asyncio.to_thread(wait_for_state, pools, SLEEPER, "asleep")
        woken.append(await client.post(f"{pools.url}/v1/completions", json=body_of(SLEEPER)))  # while its engine stops
    return statuses, woken


async def late_request(client: httpx.AsyncClient, pools: Server) -> httpx.Response:
    """One that comes while the engines start."""
    await asyncio.sleep(8)
    return await client.post(f"{pools.url}/v1/completions", json=body_of(SLEEPER))


def test_what_cannot_be_added_or_removed_is_refused_with_the_reason(
    pools: Server, story: Story, artifacts: Path, tmp_path: Path
) -> None:
    damaged = artifacts / "damaged"
    shutil.copytree(artifacts / MERGED, damaged)
    (damaged / "model" / "config.json").write_text("{}")
    other = artifacts / "other"
    convert(story.checkpoints["french"], story.base, other, "--name", "other", *MERGE)
    refusals: dict[tuple[str | Path, ...], tuple[str, str]] = {
        ("add", artifacts / MERGED, "--name", "twin"): ("transition_refused", "is served here already, as"),
        ("add", story.artifacts["german"]): ("path_refused", "is not below a directory"),
        ("add", damaged): ("pool_refused", "config.json"),
        ("add", artifacts): ("pool_refused", "manifest.json"),
        ("remove", "tiny-llama"): ("transition_refused", "was given to `run`"),
        ("add", other, "--vllm-arg=--max-model-len=none"): ("pool_refused", "vLLM refuses its arguments"),
        ("remove", "unknown"): ("model_not_found", "`unknown`"),
    }
    for arguments, (code, reason) in refusals.items():
        result = pools.command("pool", *arguments)
        assert result.returncode == 1
        assert f"error[{code}]" in result.stderr
        assert reason in result.stderr.replace("\n", " ")
    assert {name: pool["state"] for name, pool in pools_of(pools).items()} == {
        "tiny-llama": "running",
        MERGED: "running",
    }


def test_no_pool_is_changed_without_an_admin_token(pools: Server, artifacts: Path) -> None:
    url = f"{pools.url}/admin/v1/pools"
    for response in (
        httpx.get(url),
        httpx.post(url, json={"path": str(artifacts / MERGED)}),
        httpx.delete(f"{url}/{MERGED}"),
    ):
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_admin_token")
