"""What is counted and logged of requests, through the whole gateway in front of an engine without a model."""

from __future__ import annotations

import asyncio
import json
from collections import Counter

import pytest
from starlette.types import Receive, Scope, Send

from serve.adapters.identity_check import IdentityChecker
from serve.observability.metrics import FIRST_TOKEN_SECONDS, REQUEST_SECONDS
from serve.observability.recorder import Finished
from serve.settings import GatewaySettings, MetricsSettings
from tests.serve.conftest import candidate
from tests.serve.fakes import respond
from tests.serve.measured import KEY, PIRATE, Server, logs, server, stream

__all__ = ["logs", "server"]  # fixtures


async def test_requests_are_counted_by_adapter_and_code(server: Server) -> None:
    for model in ("pirate", "pirate", f"pirate@{PIRATE.revision[:12]}", "small-llama", "nobody"):
        await server.ask(model)

    assert server.samples("graft_requests_total") == {
        ("pirate", "200"): 3,
        ("(base)", "200"): 1,
        ("(unknown)", "404"): 1,
    }
    assert server.samples("graft_rejected_requests_total")[("model_not_found",)] == 1


async def test_an_adapter_is_found_where_it_is(server: Server) -> None:
    for model in ("pirate", "pirate", "zephyr", "zephyr"):
        await server.ask(model)
        await asyncio.sleep(0.05)  # its slot may be taken

    levels = Counter[str]()
    for (_, level), count in server.samples("graft_adapter_hits_total").items():
        levels[level] += int(count)
    assert levels["disk"] == len(server.engine.loads) - 1, "one was loaded ahead of requests"
    assert levels.total() == 4
    assert sum(server.samples("graft_adapter_loads_total").values()) == len(server.engine.loads)
    assert sum(server.samples("graft_adapter_unloads_total").values()) == len(server.engine.unloads)
    assert len(server.lines("adapter loaded")) == len(server.engine.loads)


async def test_only_streams_have_a_first_token(server: Server) -> None:
    await server.ask("pirate")
    server.engine.handler = stream
    await server.ask("pirate")

    assert server.samples("graft_time_to_first_token_seconds_count") == {("pirate",): 1}
    assert server.samples("graft_time_to_first_token_seconds_sum")[("pirate",)] >= 0.01
    assert server.samples("graft_request_duration_seconds_count") == {("pirate",): 2}


async def leave(server: Server, first: bytes = b"") -> None:
    """Ask an engine that says nothing, or nothing after its first bytes, and leave it."""
    begun = asyncio.Event()

    async def for_ever(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        if first:
            headers = [(b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": first, "more_body": True})
        begun.set()
        while (await receive())["type"] != "http.disconnect":
            pass

    server.engine.handler = for_ever
    asking = asyncio.create_task(server.ask("pirate"))
    await begun.wait()
    asking.cancel()
    await asyncio.wait({asking})


@pytest.mark.parametrize(
    ("abandoned_after_s", "first", "failed"), [(0, b"", 1), (0, b"data: 1\n\n", 0), (60, b"", 0)],
    ids=["it-hangs", "the-answer-had-begun", "the-caller-changed-its-mind"],
)  # fmt: skip
async def test_who_leaves_an_engine_that_hangs_got_no_answer_and_who_changes_his_mind_asked_for_none(
    server: Server, monkeypatch: pytest.MonkeyPatch, abandoned_after_s: float, first: bytes, failed: int
) -> None:
    monkeypatch.setattr("serve.observability.request_record.ABANDONED_AFTER_S", abandoned_after_s)

    await leave(server, first)

    assert server.samples("graft_requests_total") == {("pirate", "499"): 1}
    assert server.samples("graft_failed_requests_total")[("pirate",)] == failed


async def test_failures_can_be_seen_to_increase_from_the_first_one_on(server: Server) -> None:
    """A counter that is born as 1 has no increase."""
    failed = server.samples("graft_failed_requests_total")

    assert set(failed.values()) == {0}
    assert failed.keys() > {("(base)",)}, "also of an adapter that was loaded, and not yet asked"


async def test_a_caller_that_leaves_is_no_failure(server: Server) -> None:
    begun = asyncio.Event()

    async def for_ever(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        begun.set()
        while (await receive())["type"] != "http.disconnect":
            pass

    server.engine.handler = for_ever
    asking = asyncio.create_task(server.ask("pirate"))
    await begun.wait()
    assert server.samples("graft_requests_in_flight") == {(): 1}
    held, limit = (server.samples(f"graft_request_body_bytes{suffix}")[()] for suffix in ("", "_limit"))
    assert 0 < held < 100 < limit
    asking.cancel()
    await asyncio.wait({asking})

    assert server.samples("graft_requests_total") == {("pirate", "499"): 1}
    assert server.samples("graft_requests_in_flight") == {(): 0}
    assert server.samples("graft_request_body_bytes") == {(): 0}


async def test_a_refused_request_says_why_in_the_metrics_and_the_log(server: Server) -> None:
    server.engine.is_dead = True

    await server.ask("pirate")

    assert server.samples("graft_rejected_requests_total")[("engine_unavailable",)] == 1
    assert server.samples("graft_engine_up") == {(): 0}
    (line,) = server.lines("request")
    assert (line["status"], line["code"], line["level"]) == (503, "engine_unavailable", "warning")


async def test_an_answer_of_the_engine_that_fails_is_counted_under_its_adapter(server: Server) -> None:
    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send, 500, b"{}")

    server.engine.handler = fail
    await server.ask("pirate")

    assert server.samples("graft_requests_total") == {("pirate", "500"): 1}
    assert server.samples("graft_failed_requests_total")[("pirate",)] == 1


async def test_an_engine_that_dies_under_a_request_is_the_reason_of_its_503(server: Server) -> None:
    async def die(scope: Scope, receive: Receive, send: Send) -> None:
        server.engine.is_dead = True
        await respond(send, 500, b"{}")

    server.engine.handler = die
    assert (await server.ask("pirate")).status_code == 503

    assert server.samples("graft_requests_total") == {("pirate", "503"): 1}
    assert server.samples("graft_rejected_requests_total")[("engine_unavailable",)] == 1


async def test_a_bug_is_counted_and_its_cause_is_in_the_log_with_the_request(server: Server) -> None:
    async def crash(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("the cause")

    server.engine.handler = crash
    await server.ask("pirate", **{"x-request-id": "mine"})

    assert server.samples("graft_requests_total") == {("pirate", "500"): 1}
    lines = [line for line in map(json.loads, server.logs) if "the cause" in line.get("exception", "")]
    assert [line["request_id"] for line in lines] == ["mine"]


async def test_the_log_names_caller_and_revision_but_no_key_and_no_prompt(server: Server) -> None:
    await server.ask("pirate", **{"x-request-id": "mine"})

    (line,) = server.lines("request")
    assert line["adapter"] == PIRATE.adapter.engine_name
    assert line["request_id"] == "mine"
    assert line["replica"] == "one"
    assert len(line["caller"]) == 16
    assert line["duration_s"] >= line["waited_s"] >= 0
    assert KEY not in "".join(server.logs)
    assert "secret prompt" not in "".join(server.logs)


async def test_a_request_without_an_id_gets_one_that_the_engine_sees(server: Server) -> None:
    answer = (await server.ask("pirate")).json()

    (line,) = server.lines("request")
    assert answer["headers"]["x-request-id"] == line["request_id"]


async def test_every_change_of_the_catalogue_is_one_line_and_one_count(server: Server) -> None:
    other = candidate("pirate", "other")

    await server.control.publish(other)
    await server.control.roll_back("pirate")

    assert [(line["verb"], line["outcome"]) for line in server.lines("catalogue changed")] == [
        ("publish", "done"),
        ("rollback", "done"),
    ]
    changes = server.samples("graft_changes_total")
    assert changes[("done", "publish")] == changes[("done", "rollback")] == 1
    assert changes[("publish_failed", "publish")] == 0, "there before it happens, or its increase is not seen"


async def test_a_publish_that_fails_is_counted_under_its_code(server: Server) -> None:
    other = candidate("pirate", "other")
    server.engine.refuses.add(other.adapter)

    with pytest.raises(Exception, match="was not published"):
        await server.control.publish(other)

    assert server.samples("graft_changes_total")[("publish_failed", "publish")] == 1
    assert server.samples("graft_adapter_loads_total")[("pirate", "failed")] == 1


async def test_inference_gateways_see_public_names_in_one_series(server: Server) -> None:
    await server.ask("pirate")

    ((labels, when),) = server.samples("vllm:lora_requests_info").items()
    assert labels == ("1", "pirate", "")
    assert when > 1e9
    assert server.samples("vllm:lora_adapter_loaded") == {("pirate", "gpu", "false"): 1}
    assert server.samples("vllm:max_gpu_lora_adapters") == {(): 1}


async def test_no_series_has_a_list_of_adapters_unless_it_was_asked_for(server: Server) -> None:
    await server.ask("pirate")
    server.snapshot.settings = server.snapshot.settings.model_copy(update={"metrics": MetricsSettings()})

    assert server.samples("vllm:lora_requests_info") == {}


async def test_a_request_that_ran_too_long_is_counted(server: Server) -> None:
    async def hang(_: Scope, receive: Receive, __: Send) -> None:
        await receive()
        await receive()

    server.engine.handler = hang
    server.policy.max_run_s = 0.05
    await server.ask("pirate")

    assert server.samples("graft_rejected_requests_total")[("run_too_long",)] == 1


def test_the_buckets_reach_as_far_as_a_request_can_take() -> None:
    gateway = GatewaySettings(admin_tokens={})

    longest_s = gateway.body_timeout_s + 2 * gateway.max_wait_s + gateway.max_run_s
    assert min(spec.buckets[-1] for spec in (REQUEST_SECONDS, FIRST_TOKEN_SECONDS)) >= longest_s


async def test_what_the_engine_says_of_a_finished_request_is_counted_under_the_public_name(server: Server) -> None:
    server.recorder.engine_finished(Finished(PIRATE.adapter.engine_name, 10, 4, 7, 0.02))
    server.recorder.engine_finished(Finished(None, 3, 0, 1, 0.0))

    assert server.samples("graft_prompt_tokens_total") == {("pirate",): 10, ("(base)",): 3}
    assert server.samples("graft_cached_prompt_tokens_total") == {("pirate",): 4, ("(base)",): 0}
    assert server.samples("graft_generated_tokens_total") == {("pirate",): 7, ("(base)",): 1}
    assert server.samples("graft_time_per_output_token_seconds_count") == {("pirate",): 1}, (
        "one token has no time between"
    )


async def test_an_adapter_that_answers_as_another_one_is_a_violation(server: Server) -> None:
    await server.ask("pirate")
    identity_checker = IdentityChecker(server.engine, server.pool, 0.25, server.recorder)

    for says in (-2.0, -2.1, -3.0):
        server.engine.says[PIRATE.adapter] = says
        await identity_checker.check()

    assert server.samples("graft_identity_checks_total") == {(): 2}
    assert server.samples("graft_identity_violations_total")[("pirate",)] == 1
    assert [line["adapter"] for line in server.lines("adapter answers as another one")] == [PIRATE.adapter.engine_name]


async def test_small_steps_do_not_add_up_to_another_adapter(server: Server) -> None:
    await server.ask("pirate")
    identity_checker = IdentityChecker(server.engine, server.pool, 0.25, server.recorder)

    for step in range(5):
        server.engine.says[PIRATE.adapter] = -2.0 - 0.1 * step
        await identity_checker.check()

    assert server.samples("graft_identity_violations_total")[("pirate",)] == 2
