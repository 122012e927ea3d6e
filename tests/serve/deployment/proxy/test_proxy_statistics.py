"""What the real HAProxy itself answered is in the metrics, and its statistics stay closed to others."""

from __future__ import annotations

import os
import re
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.observability.exporter import Exporter
from serve.observability.proxy import FILE
from tests.serve.deployment.proxy.test_haproxy import BODY, CONFIG, Dying, Living, read_request, replica, running_proxy


class Failing(Living):
    """A replica that itself answers every request with an error."""

    def handle(self) -> None:
        while read_request(self.rfile):
            self.wfile.write(b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\n\r\n")


@pytest.fixture
def metrics(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="graft-") as directory:  # a path of a Unix socket is short
        monkeypatch.setenv("GRAFT_METRICS", directory)
        yield Path(directory)


def proxy_samples(exporter: Exporter) -> dict[str, float]:
    families = text_string_to_metric_families(exporter.scrape().decode())
    return {sample.name: sample.value for family in families for sample in family.samples if "proxy" in sample.name}


def ask(url: str, path: str, times: int) -> set[int]:
    return {httpx.post(url + path, content=BODY).status_code for _ in range(times)}


def test_a_request_that_no_replica_answered_is_counted_and_an_error_of_a_replica_is_not(
    metrics: Path, tmp_path: Path
) -> None:
    exporter = Exporter(metrics)
    assert proxy_samples(exporter) == {}, "no HAProxy here yet"

    with replica(Failing) as failing, running_proxy(tmp_path, failing, failing) as url:
        before = proxy_samples(exporter)
        assert before["graft_proxy_up"] == 1
        assert ask(url, "/v1/models", 3) == {503}
        assert ask(url, "/elsewhere", 2) == {503}
        assert ask(url, "/v1/completions", 4) == {500}
        after = proxy_samples(exporter)

    assert after["graft_proxy_unanswered_total"] - before["graft_proxy_unanswered_total"] == 3 + 2
    assert after["graft_proxy_requests_total"] - before["graft_proxy_requests_total"] == 3 + 2 + 4


def test_a_health_check_that_finds_no_replica_is_no_request_of_a_caller(metrics: Path, tmp_path: Path) -> None:
    """A pod that starts is asked every few seconds for minutes."""
    exporter = Exporter(metrics)
    nobody = re.sub(r"^backend replicas\n(    .*\n)*", "", CONFIG, flags=re.M).replace(
        "    use_backend replicas if {{ path_beg /v1 /admin }}\n", ""
    )
    with running_proxy(tmp_path, 1, 1, nobody) as url:
        ask(url, "/v1/models", 1)  # its only replica is found to be gone
        before = proxy_samples(exporter)
        answers = [httpx.get(f"{url}/health") for _ in range(5)]

        assert {(answer.status_code, answer.headers["retry-after"]) for answer in answers} == {(503, "1")}
        assert {answer.json()["error"]["code"] for answer in answers} == {"engine_unavailable"}
        assert proxy_samples(exporter) == before


def test_a_replica_that_ends_without_an_answer_is_no_failure_if_another_one_answers(
    metrics: Path, tmp_path: Path
) -> None:
    exporter = Exporter(metrics)
    with replica(Dying) as dying, replica(Living) as living, running_proxy(tmp_path, dying, living) as url:
        before = proxy_samples(exporter)
        assert ask(url, "/v1/completions", 3) == {200}

        assert proxy_samples(exporter)["graft_proxy_unanswered_total"] == before["graft_proxy_unanswered_total"]


def test_counts_go_on_where_ray_replaces_the_process_and_nothing_is_lost_when_it_is_gone(
    metrics: Path, tmp_path: Path
) -> None:
    exporter = Exporter(metrics)
    counts: list[float] = []
    for times in (4, 1, 6):
        with replica(Living) as living, running_proxy(tmp_path, living, living) as url:
            ask(url, "/v1/models", times)
            samples = proxy_samples(exporter)
            assert samples["graft_proxy_up"] == 1
            counts.append(samples["graft_proxy_unanswered_total"])
        (tmp_path / "haproxy.cfg").unlink()
    gone = proxy_samples(exporter)

    # Its start is awaited with a request, too, which finds no replica.
    assert [after - before for before, after in zip([0.0, *counts], counts, strict=False)] == [5, 2, 7]
    assert (gone["graft_proxy_up"], gone["graft_proxy_unanswered_total"]) == (0, counts[-1])


def test_the_statistics_can_be_read_by_the_same_user_and_change_nothing(metrics: Path, tmp_path: Path) -> None:
    with replica(Living) as living, running_proxy(tmp_path, living, living) as url:
        mode = stat.S_IMODE((metrics / FILE).stat().st_mode)
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(os.fspath(metrics / FILE))
            connection.sendall(b"disable frontend http_frontend\n")
            refusal = connection.recv(1000)

        assert mode == 0o600
        assert b"Permission denied" in refusal
        assert ask(url, "/v1/completions", 1) == {200}
