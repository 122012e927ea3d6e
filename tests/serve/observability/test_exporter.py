"""The exporter against real Unix sockets; its text against prometheus_client's own parser."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import uvloop
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from serve.deployment.metrics_collector import MetricsCollector
from serve.deployment.metrics_socket import MetricsSocket
from serve.deployment.ports import free_port
from serve.observability.exporter import Exporter, labelled, listen, merge, not_after
from serve.observability.recorder import MetricsRecorder
from serve.settings import EngineSettings, GatewaySettings, ServeSettings
from tests.serve.conftest import BASE


@pytest.fixture
def sockets() -> Iterator[Path]:
    """A path of a Unix socket is short, and pytest's directories are not."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="graft-") as directory:
        yield Path(directory)


def snapshot(tmp_path: Path) -> MetricsCollector:
    settings = ServeSettings(
        engine=EngineSettings(model_path=tmp_path, model_name="small-llama", fingerprint=BASE),
        gateway=GatewaySettings(admin_tokens={}),
        state_dir=tmp_path,
    )
    return MetricsCollector(settings, MetricsRecorder(10))


def values(text: str, name: str) -> dict[str, float]:
    return {
        sample.labels["replica"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


names = st.from_regex(r"[a-zA-Z_:][a-zA-Z0-9_:]{0,20}", fullmatch=True)
label_names = st.from_regex(r"[a-z][a-z0-9]{0,10}", fullmatch=True)
label_values = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(
    replica=label_values.filter(bool),
    name=names,
    labels=st.dictionaries(label_names.filter(lambda label: label not in ("replica", "le")), label_values, max_size=3),
    value=st.floats(allow_nan=False),
)
@example(replica='a"\\\n', name="x", labels={}, value=1.0)
@example(replica="one", name="x", labels={"a": "} \n,"}, value=1.0)
def test_a_sample_says_the_same_with_its_replica_beside(
    replica: str, name: str, labels: dict[str, str], value: float
) -> None:
    registry = CollectorRegistry()
    gauge = Gauge(name, "for a test", tuple(labels), registry=registry)
    (gauge.labels(**labels) if labels else gauge).set(value)
    line = generate_latest(registry).decode().split("\n")[2:][0]
    text = generate_latest(registry).decode()

    merged = merge({replica: text})

    (before,) = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    (after,) = [sample for family in text_string_to_metric_families(merged) for sample in family.samples]
    assert after.labels == {**before.labels, "replica": replica}
    assert (after.name, after.value) == (before.name, before.value)
    assert labelled(line, replica) in merged


def test_samples_of_one_metric_stand_together_under_one_head() -> None:
    def exposition(number: int) -> str:
        registry = CollectorRegistry()
        Counter("requests", "Help.", ("code",), registry=registry).labels("200").inc(number)
        Histogram("seconds", "Help.", registry=registry).observe(number)
        return generate_latest(registry).decode()

    merged = merge({"one": exposition(1), "two": exposition(2)})

    families = list(text_string_to_metric_families(merged))
    assert len({family.name for family in families}) == len(families), "a metric appears twice"
    assert values(merged, "requests_total") == {"one": 1, "two": 2}
    assert merged.count("# TYPE requests_total") == 1


async def test_one_scrape_has_all_replicas_of_a_node(sockets: Path, tmp_path: Path) -> None:
    replicas = [MetricsSocket(sockets, name, snapshot(tmp_path)) for name in ("one", "two")]
    for replica in replicas:
        await replica.start()

    text = (await asyncio.to_thread(Exporter(sockets, timeout_s=60).scrape)).decode()

    assert values(text, "graft_replica_up") == {"one": 1, "two": 1}
    assert values(text, "graft_replica_ready") == {"one": 0, "two": 0}
    for replica in replicas:
        replica.close()
    assert (await asyncio.to_thread(Exporter(sockets).scrape)).decode() == ""


def test_a_scraper_that_leaves_before_all_is_reported_is_no_error(sockets: Path, tmp_path: Path) -> None:
    """With the event loop that a replica runs, which doesn't let anyone write to who has left."""
    errors: list[dict[str, object]] = []

    async def leave() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
        replica = MetricsSocket(sockets, "one", snapshot(tmp_path))
        await replica.start()
        _, writer = await asyncio.open_unix_connection(sockets / "one.sock")
        writer.transport.abort()
        await asyncio.sleep(0.3)
        replica.close()

    uvloop.run(leave())

    assert errors == []


async def test_what_a_replica_leaves_at_its_end_is_reported_for_a_while(
    sockets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = snapshot(tmp_path)
    final.is_ready = True
    with socket.socket(socket.AF_UNIX) as abandoned:
        abandoned.bind(str(sockets / "one.sock"))  # nobody listens, as after a kill
    MetricsSocket(sockets, "one", final).leave_final_snapshot()

    text = (await asyncio.to_thread(Exporter(sockets).scrape)).decode()

    assert values(text, "graft_replica_up") == {"one": 0}
    assert values(text, "graft_engine_up") == {"one": 0}
    assert values(text, "graft_replica_ready") == {"one": 1}
    assert values(text, "graft_catalogue_failures_total") == {"one": 0}
    assert not values(text, "graft_requests_in_flight")
    monkeypatch.setattr("serve.observability.exporter._KEEP_FINAL_SNAPSHOT_S", 0.0)
    text = (await asyncio.to_thread(Exporter(sockets).scrape)).decode()
    assert values(text, "graft_replica_up") == {"one": 0}
    assert not values(text, "graft_engine_up")


async def test_a_replica_that_says_nothing_costs_its_own_series_only(sockets: Path, tmp_path: Path) -> None:
    good = MetricsSocket(sockets, "good", snapshot(tmp_path))
    await good.start()
    with socket.socket(socket.AF_UNIX) as hung, socket.socket(socket.AF_UNIX) as killed:
        hung.bind(str(sockets / "hung.sock"))
        hung.listen()
        killed.bind(str(sockets / "killed.sock"))  # nobody listens

        text = (await asyncio.to_thread(Exporter(sockets, timeout_s=3).scrape)).decode()

    assert values(text, "graft_replica_up") == {"good": 1, "hung": 0, "killed": 0}
    assert values(text, "graft_engine_up").keys() == {"good"}
    good.close()


def test_a_killed_replica_is_reported_as_down_and_then_forgotten(
    sockets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = Exporter(sockets)
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(sockets / "killed.sock"))
        assert values(exporter.scrape().decode(), "graft_replica_up") == {"killed": 0}

        monkeypatch.setattr("serve.observability.exporter._FORGET_S", -1.0)
        exporter.scrape()

    assert values(exporter.scrape().decode(), "graft_replica_up") == {}


async def test_the_command_tells_over_http_and_outlives_its_replicas(sockets: Path, tmp_path: Path) -> None:
    replica = MetricsSocket(sockets, "one", snapshot(tmp_path))
    await replica.start()
    port = free_port()
    words = ("-m", "serve", "metrics", str(sockets), "--port", str(port))
    process = await asyncio.create_subprocess_exec(sys.executable, *words, stderr=asyncio.subprocess.DEVNULL)
    try:
        text = await asyncio.to_thread(_get, f"http://127.0.0.1:{port}/metrics")
        assert values(text, "graft_replica_up") == {"one": 1}
        replica.close()
        assert values(await asyncio.to_thread(_get, f"http://127.0.0.1:{port}/metrics"), "graft_replica_up") == {}
    finally:
        process.terminate()
        await process.wait()


def test_a_taken_port_is_reported(sockets: Path) -> None:
    with listen(Exporter(sockets), "127.0.0.1", 0) as server:
        command = [sys.executable, "-m", "serve", "metrics", str(sockets)]
        port = str(server.server_address[1])
        result = subprocess.run([*command, "--port", port], check=False, capture_output=True, text=True)

    assert result.returncode == 1
    assert "error[port_in_use]" in result.stderr


def test_the_end_of_a_certificate_is_reported(sockets: Path, tmp_path: Path) -> None:
    end = datetime.now(UTC).replace(microsecond=0) + timedelta(days=10)
    path = certificate(tmp_path / "tls.crt", end)

    text = Exporter(sockets, [path, tmp_path / "absent.crt"]).scrape().decode()

    assert not_after(path) == end.timestamp()
    (family,) = [
        metric for metric in text_string_to_metric_families(text) if metric.name == "graft_expiry_timestamp_seconds"
    ]
    assert [(sample.labels, sample.value) for sample in family.samples] == [
        ({"kind": "certificate", "name": "tls.crt"}, end.timestamp())
    ]


def certificate(path: Path, end: datetime) -> Path:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "graft.example")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(end - timedelta(days=90)).not_valid_after(end)
    path.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    return path


def _get(url: str) -> str:
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(url) as response:
                return str(response.read().decode())
        except OSError:
            assert time.monotonic() < deadline
            threading.Event().wait(0.1)
