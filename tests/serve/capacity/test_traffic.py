from __future__ import annotations

import json
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from serve.capacity.traffic import read_log
from serve.errors import TrafficLogInvalid
from serve.observability.access_log import AccessLog
from serve.observability.logs import set_up
from serve.observability.request_record import RequestRecord
from serve.settings import LogSettings


def lines(path: Path, *documents: object) -> Path:
    path.write_text(
        "".join(f"{document if isinstance(document, str) else json.dumps(document)}\n" for document in documents)
    )
    return path


def test_the_server_s_own_access_log_is_read(tmp_path: Path) -> None:
    set_up(LogSettings(directory=tmp_path), "r")
    log = AccessLog(sample=1.0)
    for answered_by, status in [("a@1", 200), ("a@2", 200), ("base", 200), ("a@2", 503), ("", 404)]:
        record = RequestRecord("id", "/v1/completions", adapter="-", answered_by=answered_by, status=status)
        record.began_s -= 2.0
        record.queued_s, record.running_s = record.began_s, record.began_s + 0.5
        log.request_ended(record)

    models = {model.name: model for model in read_log(tmp_path / "r.log", token_s=0.1, sample=1.0, window_s=60)}

    assert set(models) == {"a", "base"}
    assert models["a"].adapter
    assert not models["base"].adapter
    assert models["a"].rate == pytest.approx(2 * models["base"].rate)
    assert models["a"].service_s == pytest.approx(1.5, abs=0.1)
    assert models["a"].tokens == pytest.approx(15, abs=1)


def test_rates_of_a_sampled_log_are_scaled_up(tmp_path: Path) -> None:
    path = lines(tmp_path / "log", *({"time": n, "model": "a", "tokens": 10} for n in range(11)))

    (model,) = read_log(path, token_s=0.1, sample=0.1, window_s=3600)

    assert model.rate == pytest.approx(11)
    assert model.service_s == pytest.approx(1.0)


def test_the_busiest_hour_decides_whatever_the_order_of_the_lines(tmp_path: Path) -> None:
    start, chance = datetime(2026, 1, 1, tzinfo=UTC), random.Random(0)
    quiet = [{"time": (start + timedelta(hours=n)).isoformat(), "model": "quiet", "tokens": 5} for n in range(24)]
    noon = start + timedelta(hours=12, minutes=1)
    busy = [{"time": (noon + timedelta(seconds=n)).isoformat(), "model": "busy", "tokens": 5} for n in range(1800)]
    documents = quiet + busy
    chance.shuffle(documents)

    models = read_log(lines(tmp_path / "log", *documents), 0.1, 1.0, 3600)

    assert [model.name for model in models] == ["busy"] or models[0].name == "busy"
    assert models[0].rate == pytest.approx(0.5)


BAD = {
    "no JSON": ("{", "line 2"),
    "no object": ("[1]", "line 2: list"),
    "no model": ({"time": 1, "tokens": 1}, "lacks 'model'"),
    "no time": ({"model": "a", "tokens": 1}, "lacks 'time'"),
    "no work": ({"time": 1, "model": "a"}, "lacks 'tokens'"),
    "time of another kind": ({"time": "noon", "model": "a", "tokens": 1}, "line 2"),
    "negative": ({"time": 1, "model": "a", "tokens": -1}, "`tokens` is -1"),
    "not a number": ('{"time": 1, "model": "a", "tokens": NaN}', "`tokens` is nan"),
    "text for a number": ({"time": 1, "model": "a", "tokens": "many"}, "`tokens` is 'many'"),
    "name of another kind": ({"time": 1, "model": 5, "tokens": 1}, "name is no text"),
    "nested": ("[" * 100_000, "line 2"),
}


@pytest.mark.parametrize(("line", "message"), BAD.values(), ids=BAD)
def test_a_bad_line_is_named(tmp_path: Path, line: object, message: str) -> None:
    path = lines(tmp_path / "log", {"time": 0, "model": "a", "tokens": 1}, line)

    with pytest.raises(TrafficLogInvalid) as caught:
        read_log(path, 0.1, 1.0, 60)

    assert message in str(caught.value)
