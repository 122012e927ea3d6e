from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from serve.deployment.ray_environment import environment
from serve.observability import logs
from serve.observability.access_log import AccessLog
from serve.observability.request_record import RequestRecord
from serve.settings import EngineSettings, GatewaySettings, LogSettings, ServeSettings


@pytest.fixture(autouse=True)
def untouched() -> object:
    loggers = [logging.getLogger(name) for name in ("serve", "vllm")]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers, logger.level, logger.propagate = handlers, level, propagate


def written(directory: Path) -> list[str]:
    return (directory / "one.log").read_text().splitlines()


def test_a_line_is_one_json_document_whatever_is_in_it(tmp_path: Path) -> None:
    logs.set_up(LogSettings(directory=tmp_path), "one")

    logging.getLogger("serve.x").warning('a "quoted"\nline: %s', "é", extra={"adapter": "p\n@1", "trace": None})
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("serve.x").exception("it broke")

    assert "line: é" in written(tmp_path)[0], "readable as it is"
    first, second = map(json.loads, written(tmp_path))
    assert "trace" not in first, "what isn't known is left out"
    assert (first["message"], first["adapter"], first["replica"]) == ('a "quoted"\nline: é', "p\n@1", "one")
    assert first["time"].endswith("+00:00")
    assert "ValueError: broken" in second["exception"]


def test_text_is_for_people(tmp_path: Path) -> None:
    logs.set_up(LogSettings(directory=tmp_path, format="text"), "one")

    logging.getLogger("serve.x").info("adapter loaded", extra={"event": "adapter loaded", "fetch_s": 0.5})

    assert written(tmp_path)[0].endswith("INFO adapter loaded fetch_s=0.5")


def test_lines_go_where_a_container_shows_them(tmp_path: Path) -> None:
    """The first process of a container reads nothing: what it writes goes through a pipe to the container's log."""
    reading, writing = os.pipe()
    container = subprocess.Popen(["sleep", "60"], stderr=writing)
    os.close(writing)
    logs.set_up(LogSettings(stream=Path(f"/proc/{container.pid}/fd/2")), "one")

    logging.getLogger("serve.x").warning("ours")
    logging.getLogger("vllm.engine").warning("not ours")
    container.kill()
    container.wait()
    for name in ("serve", "vllm"):
        logging.getLogger(name).handlers[0].stream.close()

    with os.fdopen(reading) as log:
        assert [json.loads(line)["message"] for line in log] == ["ours", "not ours"]


def test_a_stream_that_cannot_be_opened_stops_no_replica(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up(LogSettings(stream=tmp_path / "no" / "such"), "one")

    logging.getLogger("serve.x").warning("ours")

    problem, line = map(json.loads, capsys.readouterr().err.splitlines())
    assert "No such file" in problem["message"]
    assert line["message"] == "ours"


def test_what_vllm_says_goes_to_the_error_stream_in_the_same_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.set_up(LogSettings(directory=tmp_path), "one")

    logging.getLogger("vllm.engine").warning("not ours")
    logging.getLogger("vllm.engine").info("not asked for")

    assert written(tmp_path) == []
    (line,) = capsys.readouterr().err.splitlines()
    entry = json.loads(line)
    assert (entry["logger"], entry["message"], entry["replica"]) == ("vllm.engine", "not ours", "one")


def test_handlers_of_ray_serve_stay_open_when_the_engine_is_imported() -> None:
    """A child process, as a replica is one: with its variables, a handler like Ray Serve's, and vLLM."""
    code = """
import logging, logging.handlers
handler = logging.handlers.MemoryHandler(1, target=logging.StreamHandler())
from serve.observability import logs
from serve.engine import vllm_engine
assert handler.target is not None
"""
    settings = ServeSettings(
        engine=EngineSettings(model_path=Path(), model_name="m", fingerprint="0" * 64),
        gateway=GatewaySettings(admin_tokens={}),
        state_dir=Path(),
    )
    variables = os.environ | environment(Path(), settings)
    child = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr


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
        os.utime(tmp_path / f"{number}.log", (number, number))

    logs.set_up(LogSettings(directory=tmp_path), "one")

    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {"one.log", *(f"{number}.log" for number in range(60, 100))}, "the newest"


def test_no_line_is_written_again_by_who_else_listens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logs.set_up(LogSettings(directory=tmp_path), "one")

    logging.getLogger("serve.x").warning("ours")
    logging.getLogger("vllm.engine").warning("not ours")

    assert caplog.records == [], "the root logger, which pytest listens to and Ray may"
