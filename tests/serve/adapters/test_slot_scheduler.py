from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

from serve.names import AdapterRevision
from tests.serve.adapters.slot_story import ADAPTERS, FRENCH, JSON, PIRATE, TURN_S, Story, story


def test_requests_of_one_adapter_run_together() -> None:
    async def act(traffic: Story) -> None:
        await asyncio.gather(*(traffic.request(FRENCH, 1) for _ in range(5)))

    assert story(act).events == [(0, "+adapter-0")] * 5 + [(1, "-adapter-0")] * 5


def test_as_many_adapters_run_as_there_are_slots() -> None:
    async def act(traffic: Story) -> None:
        await asyncio.gather(*(traffic.request(adapter, 1) for adapter in ADAPTERS[:5]))

    finished = story(act, slots=2)

    assert finished.most_at_once == 2
    assert finished.begun == [adapter.name for adapter in ADAPTERS[:5]]


def test_a_slot_that_is_handed_over_takes_everyone_who_waits_for_its_new_adapter() -> None:
    async def act(traffic: Story) -> None:
        await asyncio.gather(
            traffic.request(FRENCH, 5), traffic.request(PIRATE, 1), traffic.request(JSON, 1), traffic.request(PIRATE, 1)
        )

    assert story(act).events[1:] == [
        (5, "-adapter-0"), (5, "+adapter-1"), (5, "+adapter-1"), (6, "-adapter-1"), (6, "-adapter-1"),
        (6, "+adapter-2"), (7, "-adapter-2"),
    ]  # fmt: skip


async def ask_again_and_again(traffic: Story, adapter: AdapterRevision, until_s: float, takes_s: float = 0.1) -> None:
    """A caller that asks as soon as it has its answer."""
    while asyncio.get_running_loop().time() < until_s:
        await traffic.request(adapter, takes_s)


def test_an_adapter_that_is_asked_without_end_gives_its_slot_away_after_its_turn() -> None:
    async def act(traffic: Story) -> None:
        async with asyncio.TaskGroup() as group:
            for offset in (0.0, 0.03, 0.06):
                await asyncio.sleep(offset)
                group.create_task(ask_again_and_again(traffic, FRENCH, until_s=20))
            await asyncio.sleep(5)
            group.create_task(traffic.request(PIRATE, 1))

    finished = story(act)

    # Its turn was over already when the other one came, so it finished what ran.
    assert finished.waited_s(PIRATE) <= 5.09 + 0.1 + 0.001
    assert finished.begun.count("adapter-0") > 300


def test_two_adapters_in_one_slot_take_turns_instead_of_changing_with_every_request() -> None:
    async def act(traffic: Story) -> None:
        # A load costs 0.3 s: longer than a caller needs to come back.
        for adapter in (FRENCH, PIRATE):
            traffic.slots.record_load_time(adapter, 0.3)
        await asyncio.gather(*(ask_again_and_again(traffic, adapter, 20, 0.05) for adapter in (FRENCH, PIRATE)))

    begun = story(act).begun

    changes = sum(one != other for one, other in pairwise(begun))
    assert changes <= 21
    assert len(begun) > 350
    assert abs(begun.count("adapter-0") - begun.count("adapter-1")) <= 2 * 20


def test_an_idle_slot_is_kept_no_longer_than_loading_its_adapter_took() -> None:
    async def act(traffic: Story) -> None:
        traffic.slots.record_load_time(FRENCH, 0.25)
        await asyncio.gather(traffic.request(FRENCH, 0.1), traffic.request(PIRATE, 1))

    assert story(act).waited_s(PIRATE) == pytest.approx(0.35)


async def ask_without_a_pause(traffic: Story, adapter: AdapterRevision, until_s: float, takes_s: float) -> None:
    """Three callers that never leave it idle."""
    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(ask_again_and_again(traffic, adapter, until_s, takes_s))
            await asyncio.sleep(takes_s / 3)


def test_only_as_many_slots_are_cleared_as_adapters_wait() -> None:
    async def act(traffic: Story) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(ask_without_a_pause(traffic, FRENCH, 6, takes_s=0.6))
            group.create_task(ask_without_a_pause(traffic, PIRATE, 6, takes_s=0.1))
            await asyncio.sleep(3)
            group.create_task(traffic.request(JSON, 0.5))

    finished = story(act, slots=2)

    json_began_s = finished.waited_s(JSON)
    assert 3.2 < json_began_s <= 3.6 + 0.001, "the slot that was held for longest is cleared"
    meanwhile = [event for at, event in finished.events if 3 < at < json_began_s and event == "+adapter-1"]
    assert len(meanwhile) > 5, "the other adapter was held up for nothing"


def test_a_request_that_takes_very_long_does_not_hold_up_the_others_for_ever() -> None:
    async def act(traffic: Story) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(traffic.request(FRENCH, 100))
            group.create_task(ask_without_a_pause(traffic, PIRATE, 50, takes_s=0.3))
            await asyncio.sleep(3)
            group.create_task(traffic.request(JSON, 1))

    # The oldest slot is cleared first, which takes 100 s; after a turn the other one is cleared as well.
    assert story(act, slots=2).waited_s(JSON) <= 3 + TURN_S + 2 * 0.3


def test_an_adapter_is_let_in_again_as_soon_as_its_slot_is_not_needed_any_more() -> None:
    async def act(traffic: Story) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(traffic.request(FRENCH, 10))
            group.create_task(traffic.request(PIRATE, 4))
            await asyncio.sleep(3.5)
            group.create_task(traffic.request(JSON, 1))
            group.create_task(traffic.request(FRENCH, 1))

    # Both wait: the slot of `french` is to be cleared for `json`. Then that of `pirate` comes free.
    assert [event for event in story(act, slots=2).events if event[0] == 4] == [
        (4, "-adapter-1"), (4, "+adapter-2"), (4, "+adapter-0"),
    ]  # fmt: skip


def test_who_leaves_in_the_moment_it_is_let_in_gives_the_slot_on() -> None:
    async def act(traffic: Story) -> None:
        slot = traffic.slots.acquire(FRENCH)
        await slot.__aenter__()
        leaver = asyncio.create_task(traffic.request(PIRATE, 1))
        waits = asyncio.create_task(traffic.request(JSON, 1))
        await asyncio.sleep(1)
        await slot.__aexit__(None, None, None)
        leaver.cancel()
        await waits

    assert story(act).begun == ["adapter-2"]
