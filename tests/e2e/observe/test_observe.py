"""What is seen from outside of two real engines: metrics, Prometheus' answers to every panel, alerts, logs, a trace."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from examples.observe.load import load
from examples.observe.prometheus import Prometheus, is_installed, running_prometheus
from examples.observe.queries import panel_queries
from examples.server import running_server
from serve.deployment.ports import free_port
from serve.observability.metrics import ALL, BASE
from tests.e2e.conftest import ENGINE_OPTIONS, SLOT_OPTIONS, Server, Story
from tests.serve.observability.test_tracing import CALLER, TRACE, Collector, attributes

BASE_NAME = "tiny-llama"
LOAD_S = 40
KEY = "sk-a-very-secret-key"
# A server under a small load has none of them; what tells them is tested where they happen.
NOT_WITHOUT_A_FAULT = {
    "graft_expiry_timestamp_seconds",  # tests/serve/observability/test_exporter.py
    "graft_proof_failures_total",  # tests/serve/gateway/test_telemetry_middleware.py
    "vllm:lora_requests_info",  # only with `requests_info`
    "graft_issuer_keys_age_seconds",  # only with an identity provider: tests/serve/callers/test_signing_keys.py
    "graft_issuer_failures_total",
    "graft_adapters_file_applied",  # only with an adapters.yaml: tests/serve/follower/test_applied_metric.py
    "graft_split_share",
    "graft_split_error_ratio",
    "graft_adapter_conversion_kl_nats",  # of measured conversions only
}
NO_DATA_WITHOUT_A_FAULT = ("graft_split", "ALERTS", "DCGM_", "rollback")

needs_prometheus = pytest.mark.skipif(
    not is_installed(), reason="Prometheus is a package of the system (apt-get install prometheus), not of PyPI"
)


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(scope="module")
def metrics_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def observed(
    story: Story, tmp_path_factory: pytest.TempPathFactory, collector: Collector, metrics_port: int
) -> Iterator[Server]:
    """Two engines with fewer slots than adapters, a load on them, and a change of what a name means."""
    home = tmp_path_factory.mktemp("observed")
    words = ("--base-name", BASE_NAME, "--replicas", "2", "--metrics-port", str(metrics_port), "--access-sample", "1")
    traces = ("--traces", collector.endpoint)
    artifacts = [story.artifacts["french"], story.artifacts["german"]]
    options = (*words, *traces, *SLOT_OPTIONS, *ENGINE_OPTIONS)
    with running_server(artifacts, home / "state", *options, log=home / "server.log") as url:
        yield Server(url, home / "state")


@pytest.fixture(scope="module")
def prometheus(
    observed: Server, story: Story, metrics_port: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    if not is_installed():
        pytest.skip("no Prometheus")
    directory = tmp_path_factory.mktemp("prometheus")
    with running_prometheus([f"127.0.0.1:{metrics_port}"], directory, scrape_s=1) as prometheus:
        asyncio.run(_under_load(observed, story))
        yield prometheus


async def _under_load(server: Server, story: Story) -> None:
    names = ["french", "german", BASE_NAME, "fourth", "fifth", "sixth"]
    asking = asyncio.create_task(load(server.url, names))
    for name in names[3:]:
        await asyncio.to_thread(server.command, "publish", story.artifacts["german"], "--name", name)
    await asyncio.to_thread(server.command, "publish", story.artifacts["french-2"])
    await asyncio.sleep(LOAD_S)
    await asyncio.to_thread(server.command, "rollback", "french")
    await asyncio.sleep(5)
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as response:
        text: str = response.read().decode()
        return text


def until(condition: Callable[[], bool], timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to be"
        time.sleep(0.5)


@needs_prometheus
def test_every_metric_is_reported_by_the_real_server(prometheus: Prometheus, metrics_port: int) -> None:
    families = list(text_string_to_metric_families(scrape(metrics_port)))
    sample_names = {sample.name for family in families for sample in family.samples}

    expected = {spec.name + ("_count" if spec.kind == "histogram" else "") for spec in ALL}
    assert expected - sample_names <= NOT_WITHOUT_A_FAULT
    assert {name for name in sample_names if name.startswith("graft_")} <= {
        spec.name + suffix
        for spec in ALL
        for suffix in (("_bucket", "_count", "_sum") if spec.kind == "histogram" else ("",))
    }, "an undocumented metric"


@needs_prometheus
def test_every_panel_has_data(prometheus: Prometheus) -> None:
    queries = [
        query for query in panel_queries("30s") if not any(word in query.expression for word in NO_DATA_WITHOUT_A_FAULT)
    ]

    assert len(queries) > 60
    assert [str(query) for query in queries if not prometheus.query_range(query.expression, LOAD_S, step_s=2)] == []


@needs_prometheus
def test_the_engine_s_own_metrics_keep_their_names_and_labels(prometheus: Prometheus, metrics_port: int) -> None:
    families = {family.name: family for family in text_string_to_metric_families(scrape(metrics_port))}

    tokens = families["vllm:generation_tokens"].samples
    assert {tuple(sorted(sample.labels)) for sample in tokens if sample.name.endswith("_total")} == {
        ("engine", "model_name", "replica")
    }
    assert {sample.labels["model_name"] for sample in tokens} == {BASE_NAME}
    assert "vllm:lora_requests_info" not in families, "it has a list of adapters as a label"


@needs_prometheus
def test_a_request_is_counted_as_the_engine_counts_it(
    prometheus: Prometheus, observed: Server, metrics_port: int
) -> None:
    def counted() -> dict[str, float]:
        """Of the base model, which nobody else asks for now, by all replicas."""
        samples = [
            sample for family in text_string_to_metric_families(scrape(metrics_port)) for sample in family.samples
        ]
        of_base = [sample for sample in samples if sample.labels.get("adapter") == BASE]
        names = {sample.name for sample in of_base}
        return {name: sum(sample.value for sample in of_base if sample.name == name) for name in names}

    before = counted()
    usage = (
        OpenAI(base_url=f"{observed.url}/v1", api_key=KEY)
        .chat.completions.create(
            model=BASE_NAME,
            messages=[{"role": "user", "content": "hello"}],
            max_tokens=7,
            extra_body={"ignore_eos": True},
        )
        .usage
    )
    assert usage
    until(lambda: counted()["graft_requests_total"] > before["graft_requests_total"], timeout_s=10)
    after = counted()

    assert (
        after["graft_generated_tokens_total"] - before["graft_generated_tokens_total"] == usage.completion_tokens == 7
    )
    assert after["graft_prompt_tokens_total"] - before["graft_prompt_tokens_total"] == usage.prompt_tokens
    name = "graft_time_per_output_token_seconds_count"
    assert after[name] - before[name] == 1


@needs_prometheus
def test_lines_of_log_tell_the_life_of_adapters_and_no_key(prometheus: Prometheus, observed: Server) -> None:
    OpenAI(base_url=f"{observed.url}/v1", api_key=KEY).chat.completions.create(
        model="french", messages=[{"role": "user", "content": "hello"}], max_tokens=2
    )
    time.sleep(0.5)
    text = "".join(path.read_text() for path in (observed.state / "logs").glob("*.log"))
    lines = [json.loads(line) for line in text.split("\n") if line]

    events = {line.get("event") for line in lines}
    assert {"replica ready", "adapter loaded", "adapter unloaded", "catalogue changed", "request"} <= events
    assert any(line.get("adapter", "").startswith("french@") for line in lines if line.get("event") == "request")
    assert KEY not in text


def test_one_trace_leads_from_the_caller_into_the_engine(observed: Server, collector: Collector) -> None:
    collector.spans.clear()
    OpenAI(base_url=f"{observed.url}/v1", api_key=KEY).chat.completions.create(
        model="french", messages=[{"role": "user", "content": "hello"}], max_tokens=4,
        extra_headers={"traceparent": f"00-{TRACE}-{CALLER}-01"},
    )  # fmt: skip

    def requests_of_user() -> list[object]:
        return [span for span in collector.spans if span.trace_id.hex() == TRACE]

    until(lambda: len(requests_of_user()) >= 2, timeout_s=30)
    spans = {span.name: span for span in collector.spans if span.trace_id.hex() == TRACE}
    gateway, engine = spans["chat french"], spans["llm_request"]
    assert gateway.parent_span_id.hex() == CALLER
    assert engine.parent_span_id == gateway.span_id
    assert attributes(engine)["gen_ai.usage.completion_tokens"] == 4
    assert attributes(gateway)["graft.adapter.level"] in ("gpu", "cpu", "disk")


@needs_prometheus
def test_a_dead_engine_is_seen_and_the_exporter_goes_on(
    prometheus: Prometheus, observed: Server, metrics_port: int
) -> None:
    """The last test: a replica is replaced after it."""
    replica = next(process for process in psutil.process_iter(["cmdline"]) if _is_replica_of(process, observed))
    killed_at = time.time()
    replica.send_signal(signal.SIGKILL)

    until(lambda: any(sample["value"][1] == "0" for sample in prometheus.query("graft_replica_up")))
    assert "graft_engine_up" in scrape(metrics_port), "the other replica is told on"
    until(lambda: "GraftReplicaDown" in prometheus.firing(), timeout_s=120)
    assert time.time() - killed_at > 60, "not before its minute"


def _is_replica_of(process: psutil.Process, server: Server) -> bool:
    with contextlib.suppress(psutil.Error):
        words = " ".join(process.info["cmdline"] or ())
        if not words.startswith("ray::ServeReplica"):
            return False
        logs = {Path(file.path) for file in process.open_files()}
        return any(path.parent == server.state / "logs" for path in logs)
    return False
