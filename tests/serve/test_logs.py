from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from serve import logs
from serve.access import AccessLog
from serve.config import LogSettings
from serve.request_record import RequestRecord


@pytest.fixture(autouse=True)
def untouched() -> object:
    logger = logging.getLogger("serve")
    before = (logger.handlers, logger.level, logger.propagate)
    yield
    logger.handlers, logger.level, logger.propagate = before


def written(directory: Path) -> list[str]:
    return (directory / "one.log").read_text().splitlines()


def test_a_line_is_one_json_document_whatever_is_in_it(tmp_path: Path) -> None:
    logs.set_up(LogSettings(directory=tmp_path), "one")

    logging.getLogger("serve.x").warning('a "quoted"\nline: %s', "é", extra={"event": "test", "adapter": "p\n@1"})
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("serve.x").exception("it broke")

    first, second = map(json.loads, written(tmp_path))
    assert (first["message"], first["adapter"], first["replica"]) == ('a "quoted"\nline: é', "p\n@1", "one")
    assert first["time"].endswith("+00:00")
    assert "ValueError: broken" in second["exception"]


def test_text_is_for_people(tmp_path: Path) -> None:
    logs.set_up(LogSettings(directory=tmp_path, format="text"), "one")

    logging.getLogger("serve.x").info("adapter loaded", extra={"event": "adapter loaded", "fetch_s": 0.5})

    assert written(tmp_path)[0].endswith("INFO adapter loaded fetch_s=0.5")


def test_other_packages_keep_their_own_logs(tmp_path: Path) -> None:
    logs.set_up(LogSettings(directory=tmp_path), "one")

    logging.getLogger("vllm").warning("not ours")

    assert written(tmp_path) == []


def test_a_sample_of_good_answers_is_written_down_and_every_failure(tmp_path: Path) -> None:
    logs.set_up(LogSettings(directory=tmp_path), "one")
    access = AccessLog(sample=0.1)

    for status in (200, 503):
        for _ in range(2000):
            access.request_ended(RequestRecord("id", "/v1/completions", status=status))

    statuses = [json.loads(line)["status"] for line in written(tmp_path)]
    assert statuses.count(503) == 2000
    assert 100 < statuses.count(200) < 320


def test_files_of_replicas_that_are_long_gone_are_removed(tmp_path: Path) -> None:
    for number in range(100):
        (tmp_path / f"{number}.log").touch()

    logs.set_up(LogSettings(directory=tmp_path), "one")

    assert len(list(tmp_path.iterdir())) <= 41
