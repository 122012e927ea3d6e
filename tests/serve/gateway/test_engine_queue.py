from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.errors import CallerQueueFull, EngineQueueFull, EngineWaitTooLong
from serve.gateway.engine_queue import EngineQueue, QueueLimits
from tests.serve import virtual_time

ROOM = QueueLimits(max_waiting=10_000, max_waiting_per_caller=10_000, max_wait_s=1e6)


class Engine:
    """Takes a second for each request, and remembers their order."""

    def __init__(self, count: int, limits: QueueLimits = ROOM) -> None:
        self.engine_queue = EngineQueue(count, limits)
        self.order: list[str] = []
        self.most = 0

    async def ask(self, caller: str, model: str = "base") -> None:
        async with self.engine_queue.acquire(caller, model):
            self.order.append(f"{caller}/{model}")
            self.most = max(self.most, self.engine_queue.running)
            await asyncio.sleep(1)


async def begin(*requests: asyncio.Task[None]) -> None:
    await asyncio.sleep(0.01)


def ask(engine: Engine, caller: str, model: str = "base") -> asyncio.Task[None]:
    return asyncio.create_task(engine.ask(caller, model))


def test_no_more_run_than_there_are_places() -> None:
    async def main() -> Engine:
        engine = Engine(3)
        await asyncio.gather(*(engine.ask(f"caller-{number % 7}") for number in range(50)))
        return engine

    engine = virtual_time.run(main())

    assert engine.most == 3
    assert len(engine.order) == 50
    assert (engine.engine_queue.running, engine.engine_queue.waiting) == (0, 0)


def test_a_place_that_is_left_early_is_left_once() -> None:
    async def main() -> Engine:
        engine = Engine(1)
        async with engine.engine_queue.acquire("early", "base") as release:
            release()
            await asyncio.gather(*(engine.ask("late") for _ in range(3)))
            release()
        return engine

    engine = virtual_time.run(main())

    assert engine.most == 1
    assert (engine.engine_queue.running, engine.engine_queue.waiting) == (0, 0)


def test_a_burst_of_200_costs_another_caller_one_turn_each() -> None:
    async def main() -> Engine:
        engine = Engine(1)
        burst = [ask(engine, "burst") for _ in range(200)]
        await begin()
        quiet = [ask(engine, "quiet") for _ in range(3)]
        await asyncio.gather(*burst, *quiet)
        return engine

    order = virtual_time.run(main()).order

    positions = [number for number, who in enumerate(order) if who == "quiet/base"]
    assert positions == [2, 4, 6], "one that runs, one whose turn it was, then in turns"


def test_the_models_of_one_caller_take_turns_too() -> None:
    async def main() -> Engine:
        engine = Engine(1)
        tasks = [ask(engine, "a", "x") for _ in range(4)]
        await begin()
        tasks += [ask(engine, "a", "y") for _ in range(2)]
        await asyncio.gather(*tasks)
        return engine

    assert virtual_time.run(main()).order == ["a/x", "a/x", "a/y", "a/x", "a/y", "a/x"]


def test_a_caller_with_many_models_gets_no_more_than_one_with_one() -> None:
    async def main() -> Engine:
        engine = Engine(1)
        tasks = [ask(engine, "many", f"model-{number}") for number in range(20)]
        await begin()
        tasks += [ask(engine, "one") for _ in range(3)]
        await asyncio.gather(*tasks)
        return engine

    order = virtual_time.run(main()).order

    assert [number for number, who in enumerate(order) if who.startswith("one")] == [2, 4, 6]


def test_first_come_first_served_within_a_caller_and_model() -> None:
    done: list[int] = []

    async def main() -> None:
        engine = Engine(2)

        async def numbered(number: int) -> None:
            async with engine.engine_queue.acquire("a", "x"):
                done.append(number)
                await asyncio.sleep(1)

        await asyncio.gather(*(numbered(number) for number in range(20)))

    virtual_time.run(main())

    assert done == list(range(20))


def test_beyond_the_queue_the_answer_is_no_and_at_once() -> None:
    async def main() -> None:
        engine = Engine(1, QueueLimits(max_waiting=4, max_waiting_per_caller=3, max_wait_s=100))
        tasks = [ask(engine, "a") for _ in range(4)]
        await begin()
        before = asyncio.get_running_loop().time()
        with pytest.raises(CallerQueueFull) as own:
            await engine.ask("a")
        tasks.append(ask(engine, "b"))
        await begin()
        with pytest.raises(EngineQueueFull) as all_of_it:
            await engine.ask("c")
        assert asyncio.get_running_loop().time() - before < 0.1
        assert (own.value.status, own.value.retry_after_s) == (429, 3)
        assert (all_of_it.value.status, all_of_it.value.retry_after_s) == (503, 4)
        await asyncio.gather(*tasks)
        await engine.ask("c")

    virtual_time.run(main())


def test_who_waits_for_too_long_is_told_and_leaves_the_queue() -> None:
    async def main() -> None:
        engine = Engine(1, QueueLimits(max_waiting=4, max_waiting_per_caller=4, max_wait_s=0.5))
        task = ask(engine, "a")
        await begin()
        with pytest.raises(EngineWaitTooLong):
            await engine.ask("b")
        assert engine.engine_queue.waiting == 0
        await task
        assert engine.engine_queue.running == 0

    virtual_time.run(main())


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from("xy"), st.floats(0, 5), st.none() | st.floats(0, 5)),
        max_size=30,
    ),
    st.integers(1, 4),
)
def test_whoever_leaves_whenever_every_place_is_free_in_the_end(
    requests: list[tuple[str, str, float, float | None]], count: int
) -> None:
    async def main() -> Engine:
        engine = Engine(count)

        async def come_and_go(caller: str, model: str, comes_s: float, leaves_s: float | None) -> None:
            await asyncio.sleep(comes_s)
            with suppress(TimeoutError):
                async with asyncio.timeout(leaves_s):
                    await engine.ask(caller, model)

        await asyncio.gather(*(come_and_go(*request) for request in requests))
        return engine

    engine = virtual_time.run(main())

    assert (engine.engine_queue.running, engine.engine_queue.waiting) == (0, 0)
    assert not engine.engine_queue._queues
    assert engine.most <= count


def test_who_waits_is_counted_by_model() -> None:
    async def main() -> dict[str, int]:
        engine = Engine(1)
        requests = [ask(engine, who, model) for who, model in (("a", "base"), ("a", "x"), ("b", "x"), ("b", "base"))]
        await begin()
        waiting = dict(engine.engine_queue.waiting_requests)
        await asyncio.gather(*requests)
        assert not engine.engine_queue.waiting_requests
        return waiting

    assert virtual_time.run(main()) == {"x": 2, "base": 1}
