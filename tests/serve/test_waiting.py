from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.errors import AdapterQueueFull, AdapterWaitTooLong, CallerQueueFull, ServeError
from serve.names import AdapterRevision
from serve.waiting import Turns, WaitLimits
from tests.serve.conftest import revision
from tests.serve.virtual_time import run

ADAPTERS = [revision(f"adapter-{number}", "w") for number in range(8)]
FRENCH, PIRATE, JSON, GERMAN = ADAPTERS[:4]
TURN_S = 1.0
LONG = WaitLimits(max_waiting=10_000, max_waiting_per_caller=10_000, max_wait_s=1e6, turn_s=TURN_S)


@dataclass
class Story:
    """What happened, in order: `+french` a request began, `-french` it ended."""

    turns: Turns
    events: list[tuple[float, str]] = field(default_factory=list)
    running: list[AdapterRevision] = field(default_factory=list)
    most_at_once: int = 0

    async def request(self, adapter: AdapterRevision, takes_s: float, caller: str = "") -> None:
        async with self.turns.turn(adapter, caller):
            self.running.append(adapter)
            self.most_at_once = max(self.most_at_once, len(set(self.running)))
            self._tell(f"+{adapter.name}")
            try:
                await asyncio.sleep(takes_s)
            finally:
                self.running.remove(adapter)
                self._tell(f"-{adapter.name}")

    def _tell(self, event: str) -> None:
        self.events.append((round(asyncio.get_running_loop().time(), 6), event))

    @property
    def begun(self) -> list[str]:
        return [event[1:] for _, event in self.events if event[0] == "+"]

    def waited_s(self, adapter: AdapterRevision) -> float:
        return next(at for at, event in self.events if event == f"+{adapter.name}")


def story(act: Callable[[Story], Coroutine[Any, Any, None]], slots: int = 1, limits: WaitLimits = LONG) -> Story:
    async def main() -> Story:
        told = Story(Turns(slots, limits))
        await act(told)
        assert told.turns.waiting == 0
        assert told.turns.waiting_adapters == frozenset()
        assert told.turns.running_adapters == frozenset()
        return told

    return run(main())


def test_requests_of_one_adapter_run_together() -> None:
    async def act(it: Story) -> None:
        await asyncio.gather(*(it.request(FRENCH, 1) for _ in range(5)))

    assert story(act).events == [(0, "+adapter-0")] * 5 + [(1, "-adapter-0")] * 5


def test_as_many_adapters_run_as_there_are_slots() -> None:
    async def act(it: Story) -> None:
        await asyncio.gather(*(it.request(adapter, 1) for adapter in ADAPTERS[:5]))

    told = story(act, slots=2)

    assert told.most_at_once == 2
    assert told.begun == [adapter.name for adapter in ADAPTERS[:5]]


def test_a_slot_that_is_handed_over_takes_everyone_who_waits_for_its_new_adapter() -> None:
    async def act(it: Story) -> None:
        await asyncio.gather(it.request(FRENCH, 5), it.request(PIRATE, 1), it.request(JSON, 1), it.request(PIRATE, 1))

    assert story(act).events[1:] == [
        (5, "-adapter-0"), (5, "+adapter-1"), (5, "+adapter-1"), (6, "-adapter-1"), (6, "-adapter-1"),
        (6, "+adapter-2"), (7, "-adapter-2"),
    ]  # fmt: skip


async def ask_again_and_again(it: Story, adapter: AdapterRevision, until_s: float, takes_s: float = 0.1) -> None:
    """A caller that asks as soon as it has its answer."""
    while asyncio.get_running_loop().time() < until_s:
        await it.request(adapter, takes_s)


def test_an_adapter_that_is_asked_without_end_gives_its_slot_away_after_its_turn() -> None:
    async def act(it: Story) -> None:
        async with asyncio.TaskGroup() as group:
            for offset in (0.0, 0.03, 0.06):
                await asyncio.sleep(offset)
                group.create_task(ask_again_and_again(it, FRENCH, until_s=20))
            await asyncio.sleep(5)
            group.create_task(it.request(PIRATE, 1))

    told = story(act)

    # Its turn was over already when the other one came, so it finished what ran.
    assert told.waited_s(PIRATE) <= 5.09 + 0.1 + 0.001
    assert told.begun.count("adapter-0") > 300


def test_two_adapters_in_one_slot_take_turns_instead_of_changing_with_every_request() -> None:
    async def act(it: Story) -> None:
        # A load costs 0.3 s: longer than a caller needs to come back.
        for adapter in (FRENCH, PIRATE):
            it.turns.loaded(adapter, 0.3)
        await asyncio.gather(*(ask_again_and_again(it, adapter, 20, 0.05) for adapter in (FRENCH, PIRATE)))

    begun = story(act).begun

    changes = sum(one != other for one, other in pairwise(begun))
    assert changes <= 21
    assert len(begun) > 350
    assert abs(begun.count("adapter-0") - begun.count("adapter-1")) <= 2 * 20


def test_an_idle_slot_is_kept_no_longer_than_loading_its_adapter_took() -> None:
    async def act(it: Story) -> None:
        it.turns.loaded(FRENCH, 0.25)
        await asyncio.gather(it.request(FRENCH, 0.1), it.request(PIRATE, 1))

    assert story(act).waited_s(PIRATE) == pytest.approx(0.35)


async def ask_without_a_pause(it: Story, adapter: AdapterRevision, until_s: float, takes_s: float) -> None:
    """Three callers that never leave it idle."""
    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(ask_again_and_again(it, adapter, until_s, takes_s))
            await asyncio.sleep(takes_s / 3)


def test_only_as_many_slots_are_cleared_as_adapters_wait() -> None:
    async def act(it: Story) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(ask_without_a_pause(it, FRENCH, 6, takes_s=0.6))
            group.create_task(ask_without_a_pause(it, PIRATE, 6, takes_s=0.1))
            await asyncio.sleep(3)
            group.create_task(it.request(JSON, 0.5))

    told = story(act, slots=2)

    json_began_s = told.waited_s(JSON)
    assert 3.2 < json_began_s <= 3.6 + 0.001, "the slot that was held for longest is cleared"
    meanwhile = [event for at, event in told.events if 3 < at < json_began_s and event == "+adapter-1"]
    assert len(meanwhile) > 5, "the other adapter was held up for nothing"


def test_a_request_that_takes_very_long_does_not_hold_up_the_others_for_ever() -> None:
    async def act(it: Story) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(it.request(FRENCH, 100))
            group.create_task(ask_without_a_pause(it, PIRATE, 50, takes_s=0.3))
            await asyncio.sleep(3)
            group.create_task(it.request(JSON, 1))

    # The oldest slot is cleared first, which takes 100 s; after a turn the other one is cleared as well.
    assert story(act, slots=2).waited_s(JSON) <= 3 + TURN_S + 2 * 0.3


def test_an_adapter_is_let_in_again_as_soon_as_its_slot_is_not_needed_any_more() -> None:
    async def act(it: Story) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(it.request(FRENCH, 10))
            group.create_task(it.request(PIRATE, 4))
            await asyncio.sleep(3.5)
            group.create_task(it.request(JSON, 1))
            group.create_task(it.request(FRENCH, 1))

    # Both wait: the slot of `french` is to be cleared for `json`. Then that of `pirate` comes free.
    assert [it for it in story(act, slots=2).events if it[0] == 4] == [
        (4, "-adapter-1"), (4, "+adapter-2"), (4, "+adapter-0"),
    ]  # fmt: skip


def test_who_leaves_in_the_moment_it_is_let_in_gives_the_slot_on() -> None:
    async def act(it: Story) -> None:
        slot = it.turns.turn(FRENCH)
        await slot.__aenter__()
        leaver = asyncio.create_task(it.request(PIRATE, 1))
        waits = asyncio.create_task(it.request(JSON, 1))
        await asyncio.sleep(1)
        await slot.__aexit__(None, None, None)
        leaver.cancel()
        await waits

    assert story(act).begun == ["adapter-2"]


def test_beyond_the_bound_a_request_is_refused_at_once_with_when_to_come_back() -> None:
    async def act(it: Story) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(it.request(FRENCH, 10))
            await asyncio.sleep(0.1)
            for number in range(3):
                group.create_task(it.request(PIRATE, 1, caller=str(number)))
            await asyncio.sleep(0.1)
            with pytest.raises(AdapterQueueFull, match="3 requests wait") as told:
                await it.request(JSON, 1, caller="another")
            assert asyncio.get_running_loop().time() == pytest.approx(0.2)
            assert (told.value.status, told.value.code) == (503, "adapter_queue_full")
            assert told.value.retry_after_s == 2
            assert it.turns.waiting == 3

    story(act, limits=WaitLimits(max_waiting=3, max_waiting_per_caller=3, max_wait_s=60, turn_s=1))


def test_one_caller_can_not_fill_the_queue() -> None:
    async def act(it: Story) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(it.request(FRENCH, 10))
            await asyncio.sleep(0.1)
            for _ in range(2):
                group.create_task(it.request(PIRATE, 1, caller="greedy"))
            await asyncio.sleep(0.1)
            with pytest.raises(CallerQueueFull) as told:
                await it.request(JSON, 1, caller="greedy")
            assert (told.value.status, told.value.code) == (429, "caller_queue_full")
            assert told.value.retry_after_s
            group.create_task(it.request(JSON, 1, caller="modest"))

    told = story(act, limits=WaitLimits(max_waiting=4, max_waiting_per_caller=2, max_wait_s=60, turn_s=1))

    assert told.begun.count("adapter-2") == 1


def test_a_request_gives_up_after_the_longest_wait() -> None:
    async def act(it: Story) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(it.request(FRENCH, 10))
            await asyncio.sleep(0.1)
            with pytest.raises(AdapterWaitTooLong, match="within 5 s"):
                await it.request(PIRATE, 1)
            assert asyncio.get_running_loop().time() == pytest.approx(5.1)

    story(act, limits=WaitLimits(max_wait_s=5))


def test_a_caller_that_leaves_the_queue_frees_its_place_and_the_way_at_once() -> None:
    async def act(it: Story) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(it.request(FRENCH, 10))
            await asyncio.sleep(2)
            leaver = group.create_task(it.request(PIRATE, 1))
            await asyncio.sleep(0.1)
            held_up = group.create_task(it.request(FRENCH, 1))
            await asyncio.sleep(0.1)
            assert it.turns.waiting == 2
            leaver.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert it.turns.waiting == 0, "nobody waits for the slot any more, so its adapter takes new requests"
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

    async def one(it: Story, number: int, ask: Ask) -> None:
        await asyncio.sleep(ask.at_s)
        it.turns.loaded(ADAPTERS[ask.adapter], ask.load_s)
        try:
            async with asyncio.timeout(ask.leaves_after_s):
                await it.request(ADAPTERS[ask.adapter], ask.takes_s)
            begun.add(number)
        except TimeoutError:
            pass

    async def act(it: Story) -> None:
        await asyncio.gather(*(one(it, number, ask) for number, ask in enumerate(asks)))

    told = story(act, slots)

    assert told.most_at_once <= slots
    assert {number for number, ask in enumerate(asks) if ask.leaves_after_s is None} <= begun
    # Everything together needs no longer than one after another, each with its longest idle wait.
    assert told.events == [] or told.events[-1][0] <= 5 + sum(ask.takes_s + TURN_S for ask in asks)


@settings(max_examples=100)
@given(asks=ASKS, slots=st.integers(1, 3))
def test_whoever_is_refused_is_refused_without_waiting(asks: list[Ask], slots: int) -> None:
    async def one(it: Story, ask: Ask) -> None:
        await asyncio.sleep(ask.at_s)
        asked_s = asyncio.get_running_loop().time()
        try:
            await it.request(ADAPTERS[ask.adapter], ask.takes_s, caller=str(ask.adapter % 2))
        except (AdapterQueueFull, CallerQueueFull):
            assert asyncio.get_running_loop().time() == asked_s
        except ServeError:
            assert asyncio.get_running_loop().time() == pytest.approx(asked_s + 3)
        assert it.turns.waiting <= 6

    async def act(it: Story) -> None:
        await asyncio.gather(*(one(it, ask) for ask in asks))

    story(act, slots, WaitLimits(max_waiting=6, max_waiting_per_caller=4, max_wait_s=3, turn_s=TURN_S))


def test_a_patient_one_waits_in_its_turn_without_the_limits() -> None:
    async def act(it: Story) -> None:
        async def prove() -> None:
            async with it.turns.turn(PIRATE, patient=True):
                it._tell("+proof")

        running = asyncio.create_task(it.request(FRENCH, 5))
        await asyncio.sleep(0)
        proving = asyncio.create_task(prove())
        await asyncio.sleep(0)
        with pytest.raises(AdapterQueueFull):
            await it.request(JSON, 1)
        await asyncio.gather(running, proving)

    limits = WaitLimits(max_waiting=0, max_waiting_per_caller=10, max_wait_s=1, turn_s=TURN_S)
    assert (5, "+proof") in story(act, slots=1, limits=limits).events
