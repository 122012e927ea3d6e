"""Bounds of the queue for adapter slots: refusals, the longest wait, and what holds for any traffic."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.adapters.slot_scheduler import WaitLimits
from serve.errors import AdapterQueueFull, AdapterWaitTooLong, CallerQueueFull, ServeError
from tests.serve.adapters.slot_story import ADAPTERS, FRENCH, JSON, PIRATE, TURN_S, Story, story


def test_beyond_the_bound_a_request_is_refused_at_once_with_when_to_come_back() -> None:
    async def act(traffic: Story) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(traffic.request(FRENCH, 10))
            await asyncio.sleep(0.1)
            for number in range(3):
                group.create_task(traffic.request(PIRATE, 1, caller=str(number)))
            await asyncio.sleep(0.1)
            with pytest.raises(AdapterQueueFull, match="3 requests wait") as caught:
                await traffic.request(JSON, 1, caller="another")
            assert asyncio.get_running_loop().time() == pytest.approx(0.2)
            assert (caught.value.status, caught.value.code) == (503, "adapter_queue_full")
            assert caught.value.retry_after_s == 2
            assert traffic.slots.waiting == 3

    story(act, limits=WaitLimits(max_waiting=3, max_waiting_per_caller=3, max_wait_s=60, turn_s=1))


def test_one_caller_can_not_fill_the_queue() -> None:
    async def act(traffic: Story) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(traffic.request(FRENCH, 10))
            await asyncio.sleep(0.1)
            for _ in range(2):
                group.create_task(traffic.request(PIRATE, 1, caller="greedy"))
            await asyncio.sleep(0.1)
            with pytest.raises(CallerQueueFull) as caught:
                await traffic.request(JSON, 1, caller="greedy")
            assert (caught.value.status, caught.value.code) == (429, "caller_queue_full")
            assert caught.value.retry_after_s
            group.create_task(traffic.request(JSON, 1, caller="modest"))

    finished = story(act, limits=WaitLimits(max_waiting=4, max_waiting_per_caller=2, max_wait_s=60, turn_s=1))

    assert finished.begun.count("adapter-2") == 1


def test_a_request_gives_up_after_the_longest_wait() -> None:
    async def act(traffic: Story) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(traffic.request(FRENCH, 10))
            await asyncio.sleep(0.1)
            with pytest.raises(AdapterWaitTooLong, match="within 5 s"):
                await traffic.request(PIRATE, 1)
            assert asyncio.get_running_loop().time() == pytest.approx(5.1)

    story(act, limits=WaitLimits(max_wait_s=5))


def test_a_caller_that_leaves_the_queue_frees_its_place_and_the_way_at_once() -> None:
    async def act(traffic: Story) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(traffic.request(FRENCH, 10))
            await asyncio.sleep(2)
            leaver = group.create_task(traffic.request(PIRATE, 1))
            await asyncio.sleep(0.1)
            held_up = group.create_task(traffic.request(FRENCH, 1))
            await asyncio.sleep(0.1)
            assert traffic.slots.waiting == 2
            leaver.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert traffic.slots.waiting == 0, "nobody waits for the slot any more, so its adapter takes new requests"
            await held_up

    assert story(act).begun == ["adapter-0", "adapter-0"]


@dataclass(frozen=True)
class Ask:
    adapter: int
    at_s: float
    takes_s: float
    load_s: float
    leaves_after_s: float | None


ASKS = st.lists(
    st.builds(
        Ask,
        adapter=st.integers(0, len(ADAPTERS) - 1),
        at_s=st.floats(0, 5),
        takes_s=st.floats(0.001, 2),
        load_s=st.sampled_from([0.0, 0.01, 0.5, 3.0]),
        leaves_after_s=st.none() | st.floats(0, 4),
    ),
    min_size=1,
    max_size=60,
)


@settings(max_examples=300)
@given(asks=ASKS, slots=st.integers(1, 4))
def test_no_traffic_starves_anyone_or_runs_more_adapters_than_slots(asks: list[Ask], slots: int) -> None:
    begun: set[int] = set()

    async def one(traffic: Story, number: int, ask: Ask) -> None:
        await asyncio.sleep(ask.at_s)
        traffic.slots.record_load_time(ADAPTERS[ask.adapter], ask.load_s)
        try:
            async with asyncio.timeout(ask.leaves_after_s):
                await traffic.request(ADAPTERS[ask.adapter], ask.takes_s)
            begun.add(number)
        except TimeoutError:
            pass

    async def act(traffic: Story) -> None:
        await asyncio.gather(*(one(traffic, number, ask) for number, ask in enumerate(asks)))

    finished = story(act, slots)

    assert finished.most_at_once <= slots
    assert {number for number, ask in enumerate(asks) if ask.leaves_after_s is None} <= begun
    # Everything together needs no longer than one after another, each with its longest idle wait.
    assert finished.events == [] or finished.events[-1][0] <= 5 + sum(ask.takes_s + TURN_S for ask in asks)


@settings(max_examples=100)
@given(asks=ASKS, slots=st.integers(1, 3))
def test_whoever_is_refused_is_refused_without_waiting(asks: list[Ask], slots: int) -> None:
    async def one(traffic: Story, ask: Ask) -> None:
        await asyncio.sleep(ask.at_s)
        asked_s = asyncio.get_running_loop().time()
        try:
            await traffic.request(ADAPTERS[ask.adapter], ask.takes_s, caller=str(ask.adapter % 2))
        except (AdapterQueueFull, CallerQueueFull):
            assert asyncio.get_running_loop().time() == asked_s
        except ServeError:
            assert asyncio.get_running_loop().time() == pytest.approx(asked_s + 3)
        assert traffic.slots.waiting <= 6

    async def act(traffic: Story) -> None:
        await asyncio.gather(*(one(traffic, ask) for ask in asks))

    story(act, slots, WaitLimits(max_waiting=6, max_waiting_per_caller=4, max_wait_s=3, turn_s=TURN_S))
