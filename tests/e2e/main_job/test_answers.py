"""What clients get: every adapter's own function, through the official client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from tests.convert import parts
from tests.e2e.conftest import Server, Story, reference_logprobs

BASE = "tiny-llama"
PROMPT = [0, 17, 99, 140, 3, 250, 61, 8, 200, 33, 77, 5]
# The engine computes in bfloat16 (8 bits of mantissa), the reference in float32.
TOLERANCE_NATS = 0.15


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def trained(story: Story) -> dict[str, torch.Tensor]:
    """The functions as trained, by peft: the adapter unmerged on the dequantized 4-bit weights."""
    dequantized = parts.dequantized_model(story.base)
    expected = {BASE: reference_logprobs(dequantized, PROMPT)}
    for name in ("french", "german"):
        model = parts.with_adapter(parts.dequantized_model(story.base), story.checkpoints[name])
        expected[name] = reference_logprobs(model, PROMPT)
    return expected


def next_token_logprobs(client: openai.OpenAI, model: str) -> dict[int, float]:
    """The engine's five best next tokens by id."""
    completion = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=1, temperature=0, logprobs=5,
        extra_body={"return_tokens_as_token_ids": True},
    )  # fmt: skip
    logprobs: Any = completion.choices[0].logprobs
    return {int(token.removeprefix("token_id:")): value for token, value in logprobs.top_logprobs[0].items()}


def test_the_client_lists_the_base_and_the_adapters(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [BASE, "french", "german"]


@pytest.mark.parametrize("model", [BASE, "french", "german"])
def test_each_model_answers_with_the_function_that_was_trained(
    client: openai.OpenAI, trained: dict[str, torch.Tensor], model: str
) -> None:
    for token, logprob in next_token_logprobs(client, model).items():
        assert logprob == pytest.approx(float(trained[model][token]), abs=TOLERANCE_NATS)


def test_the_functions_differ_by_far_more_than_the_tolerance(trained: dict[str, torch.Tensor]) -> None:
    for first, second in ((BASE, "french"), (BASE, "german"), ("french", "german")):
        best = trained[first].topk(5).indices
        assert (trained[first] - trained[second])[best].abs().max() > 5 * TOLERANCE_NATS


def test_a_stream_says_the_same_as_a_whole_answer(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {
        "model": "french", "messages": [{"role": "user", "content": "the rain"}], "max_tokens": 12, "temperature": 0,
    }  # fmt: skip
    unstreamed = client.chat.completions.create(**request)
    chunks = list(client.chat.completions.create(**request, stream=True))

    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == unstreamed.choices[0].message.content
    assert {chunk.model for chunk in chunks} == {unstreamed.model}
    assert unstreamed.model == client.models.retrieve("french").model_dump()["root"]


def test_a_model_pinned_to_its_revision_is_the_same_model(client: openai.OpenAI) -> None:
    pinned = client.models.retrieve("german").model_dump()["root"]

    assert next_token_logprobs(client, pinned) == pytest.approx(next_token_logprobs(client, "german"), abs=0.05)


def test_an_unknown_model_is_a_not_found_error_to_the_client(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="italian", prompt="ciao")

    assert caught.value.code == "model_not_found"
    assert "french, german, tiny-llama" in caught.value.message


def test_the_engines_own_errors_reach_the_client(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model="french", prompt="the rain", max_tokens=100_000)


@pytest.mark.parametrize(
    ("path", "status"),
    [("/v1/load_lora_adapter", 401), ("/v1/unload_lora_adapter", 401), ("/scale_elastic_ep", 404), ("/metrics", 404)],
)
def test_engine_admin_routes_are_closed(server: Server, path: str, status: int) -> None:
    body = {"lora_name": "french", "lora_path": "/tmp"}

    assert httpx.post(server.url + path, json=body).status_code == status


def test_no_page_may_read_an_answer_as_long_as_no_origin_is_named(server: Server) -> None:
    request = {"model": "french", "prompt": "the rain", "max_tokens": 1}
    answer = httpx.post(
        f"{server.url}/v1/completions", json=request, headers={"origin": "https://page.example"}, timeout=60
    )

    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_both_engines_hold_both_adapters(server: Server) -> None:
    status = server.command("status")

    assert status.returncode == 0, status.stderr
    assert status.stdout.count("french@") == status.stdout.count("german@") == 2


def test_a_second_server_on_the_same_port_is_refused(server: Server, story: Story, tmp_path: Path) -> None:
    port = server.url.rpartition(":")[2]
    result = Server(server.url, tmp_path / "state").command("run", story.artifacts["french"], "--port", port)

    assert result.returncode == 1
    assert "error[port_in_use]" in result.stderr
