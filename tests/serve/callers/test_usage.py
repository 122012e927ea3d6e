from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import Counter
from collections.abc import AsyncGenerator
from datetime import UTC, date, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from serve.callers.usage import Meter, read_usage
from serve.catalogue.storage.object_store import DirectoryStore, ObjectStore
from serve.engine.api_errors import EngineFault
from serve.engine.token_counter import Tokens, count_outputs, count_tokens, current_counter
from serve.errors import StoreUnavailable
from tests.object_store import bucket_url, s3_server
from tests.serve.guarded import until

TODAY = datetime.now(UTC).date()


def totals(
    objects: ObjectStore, since: date = TODAY, until: date = TODAY
) -> dict[tuple[str, str], tuple[int, int, int]]:
    rows = read_usage(objects, since, until)
    return {
        (row["key"], row["model"]): (row["requests"], row["prompt_tokens"], row["completion_tokens"]) for row in rows
    }


async def test_what_many_replicas_counted_adds_up_however_often_it_was_written(tmp_path: Path) -> None:
    objects, chance, expected = DirectoryStore(tmp_path), random.Random(0), Counter[tuple[str, str]]()
    meters = [Meter(objects, 60) for _ in range(3)]

    for _ in range(500):
        names = chance.choice("abc"), chance.choice("xy")
        chance.choice(meters).add(*names, Tokens(2, 3))
        expected[names] += 1
        if chance.random() < 0.2:
            chance.choice(meters).flush()
    for meter in meters:
        await meter.stop()

    assert totals(objects) == {names: (count, 2 * count, 3 * count) for names, count in expected.items()}
    assert len(list((tmp_path / "usage" / str(TODAY)).iterdir())) == 3, "one object for each replica"


async def test_usage_survives_a_restart_and_without_keys_the_caller_is_a_dash(tmp_path: Path) -> None:
    for _ in range(2):
        meter = Meter(DirectoryStore(tmp_path), 60)
        meter.add(None, "base", Tokens(1, 1))
        await meter.stop()

    assert totals(DirectoryStore(tmp_path)) == {("-", "base"): (2, 2, 2)}


class Failing(DirectoryStore):
    """Fails to create or to delete objects while `fails` says so."""

    fails = ""
    error: Exception = StoreUnavailable("no room")

    def create(self, key: str, content: bytes) -> bool:
        if self.fails == "create":
            raise self.error
        return super().create(key, content)

    def delete(self, key: str) -> None:
        if self.fails == "delete":
            raise StoreUnavailable("gone")
        super().delete(key)


@pytest.mark.parametrize("step_that_fails", ["create", "delete"])
def test_an_outage_loses_nothing_and_counts_nothing_twice(tmp_path: Path, step_that_fails: str) -> None:
    objects = Failing(tmp_path)
    meter = Meter(objects, 60)
    meter.add("a", "x", Tokens(1, 1))
    meter.flush()
    objects.fails = step_that_fails
    for _ in range(3):
        meter.add("a", "x", Tokens(1, 1))
        with pytest.raises(StoreUnavailable):
            meter.flush()
    assert totals(objects)["a", "x"][0] in (1, 4), "whole, before or after"

    objects.fails = ""
    meter.flush()

    assert totals(objects) == {("a", "x"): (4, 4, 4)}


def test_a_replica_that_is_killed_between_two_steps_counts_nothing_twice(tmp_path: Path) -> None:
    objects = Failing(tmp_path)
    meter = Meter(objects, 60)
    for _ in range(2):
        meter.add("a", "x", Tokens(1, 1))
        objects.fails = "delete"
        with contextlib.suppress(StoreUnavailable):  # killed before it could delete its previous object
            meter.flush()

    assert len(list((tmp_path / "usage" / str(TODAY)).iterdir())) == 2
    assert totals(objects) == {("a", "x"): (2, 2, 2)}


@pytest.mark.parametrize("error", [StoreUnavailable("no room"), KeyError("day")], ids=["outage", "unexpected"])
async def test_it_is_written_now_and_then_and_an_outage_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    objects = Failing(tmp_path)
    objects.error = error
    objects.fails = "create"
    meter = Meter(objects, 0.02)
    meter.start()
    meter.add("a", "x", Tokens(1, 2))
    with caplog.at_level(logging.ERROR):
        await until(lambda: bool(caplog.records))
        await asyncio.sleep(0.3)  # it fails again and again
    assert len(caplog.records) == 1

    objects.fails = ""
    await until(lambda: bool(totals(objects)))
    assert totals(objects) == {("a", "x"): (1, 1, 2)}
    await meter.stop()


def test_an_object_store_keeps_it_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    from serve.catalogue.storage.bucket_store import BucketStore

    with s3_server() as endpoint:
        objects = BucketStore(bucket_url(endpoint, "usage", monkeypatch))
        meter = Meter(objects, 60)
        for _ in range(3):
            meter.add("a", "x", Tokens(1, 1))
            meter.flush()

        assert totals(objects) == {("a", "x"): (3, 3, 3)}
        assert len(objects.names(f"usage/{TODAY}")) == 1


def test_only_the_days_that_were_asked_for_are_reported(tmp_path: Path) -> None:
    objects = DirectoryStore(tmp_path)
    for day in ("2026-01-01", "2026-01-02", "2026-01-03"):
        objects.create(f"usage/{day}/r-1", b'[["a","x",1,2,3]]')

    assert [row["day"] for row in read_usage(objects, date(2026, 1, 2), date(2026, 1, 3))] == [
        "2026-01-02",
        "2026-01-03",
    ]


@pytest.mark.parametrize(
    ("deltas", "outputs"),
    [
        pytest.param(True, [(0, 1), (1, 1), (0, 2), (1, 3)], id="streams-tell-what-is-new"),
        pytest.param(False, [(0, 1), (1, 1), (0, 3), (1, 4)], id="others-tell-all-so-far"),
        pytest.param(False, [(0, 3), (1, 4)], id="or-all-at-the-end"),
    ],
)
async def test_tokens_of_all_sequences_are_counted_and_those_of_the_prompt_once(
    deltas: bool, outputs: list[tuple[int, int]]
) -> None:
    answers = [answer([SimpleNamespace(index=index, token_ids=[0] * count)]) for index, count in outputs]
    tokens = Tokens()

    assert [output async for output in count_outputs(engine(answers), tokens, deltas)] == answers

    assert tokens == Tokens(prompt=5, completion=7)


async def test_a_vector_has_the_tokens_of_its_prompt() -> None:
    tokens = Tokens()
    async for _ in count_outputs(engine([answer(SimpleNamespace(data=[0.5]))]), tokens, deltas=False):
        pass
    assert tokens == Tokens(prompt=5)


async def test_the_engine_learns_at_once_that_nobody_reads_on() -> None:
    generation = engine([answer([]), answer([])])
    async with contextlib.aclosing(count_outputs(generation, Tokens(), deltas=True)) as answers:
        await anext(answers)
    assert generation.ag_frame is None, "it was closed too"


def answer(outputs: object) -> SimpleNamespace:
    return SimpleNamespace(prompt_token_ids=[0] * 5, outputs=outputs)


async def engine(answers: list[SimpleNamespace]) -> AsyncGenerator[SimpleNamespace, None]:
    for output in answers:
        yield output


def test_the_counter_is_that_of_whoever_asks() -> None:
    assert current_counter() is None
    with count_tokens() as outer:
        with count_tokens() as inner:
            assert current_counter() is inner
        assert current_counter() is outer
    assert current_counter() is None


async def test_an_error_before_any_output_is_kept_and_a_later_one_is_not() -> None:
    fault = EngineFault(400, {"message": "too long"})

    async def failing(answers: list[SimpleNamespace]) -> AsyncGenerator[SimpleNamespace, None]:
        for output in answers:
            yield output
        raise RuntimeError

    for answers, kept in (([], fault), ([answer([])], None)):
        tokens = Tokens()
        with pytest.raises(RuntimeError):
            async for _ in count_outputs(failing(answers), tokens, deltas=True, fault_of=lambda _: fault):
                pass
        assert (tokens.fault, tokens.has_output) == (kept, bool(answers))


async def test_a_first_output_that_is_none_is_an_error_before_any_output() -> None:
    tokens = Tokens()

    def refuse(_: object) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        async for _ in count_outputs(
            engine([answer([])]), tokens, deltas=True, check_first=refuse, fault_of=lambda _: EngineFault(400, {})
        ):
            pass
    assert tokens.fault is not None
