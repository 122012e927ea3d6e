from __future__ import annotations

from collections import Counter

import pytest

from serve.busiest import LEAVES_AFTER_S, Busiest
from serve.events import NOBODY, Events
from serve.metrics import LOADS, OTHER, REQUESTS, Families
from serve.names import AdapterRevision
from serve.recorder import Finished, Recorder
from serve.request_record import RequestRecord

LIMIT = 100
MINUTE_S = 60.0


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def recorder(clock: Clock) -> Recorder:
    recorder = Recorder(LIMIT)
    recorder.busiest = Busiest(LIMIT, clock)
    return recorder


def ask(recorder: Recorder, adapter: str, times: int = 1) -> None:
    for _ in range(times):
        record = RequestRecord("id", "/v1/completions", adapter=adapter, status=200)
        recorder.request_ended(record, is_engine_call=True)
        recorder.engine_finished(Finished(f"{adapter}@0123456789ab", 5, 0, 3, 0.01))


def told(recorder: Recorder) -> dict[str, float]:
    """Requests by adapter, as a scrape sees them."""
    families = Families({})
    recorder.into(families)
    return {
        sample.labels["adapter"]: sample.value
        for family in families
        for sample in family.samples
        if sample.name == REQUESTS.name
    }


def series(recorder: Recorder) -> int:
    families = Families({})
    recorder.into(families)
    return sum(len(family.samples) for family in families)


def test_ten_thousand_adapters_make_a_hundred_names(recorder: Recorder) -> None:
    for number in range(10_000):
        ask(recorder, f"adapter-{number}")

    requests = told(recorder)
    assert len(requests) == LIMIT + 1
    assert requests[OTHER] == 10_000 - LIMIT
    assert sum(requests.values()) == 10_000
    none, one = Recorder(LIMIT), Recorder(LIMIT)
    ask(one, "adapter")
    assert series(recorder) == series(none) + (LIMIT + 1) * (series(one) - series(none))


def test_a_busier_adapter_gets_the_name_of_the_quietest(recorder: Recorder, clock: Clock) -> None:
    for number in range(LIMIT):
        ask(recorder, f"early-{number}", times=1 if number == 7 else 5)
    ask(recorder, "late", times=50)
    assert "late" not in told(recorder)

    clock.now_s += MINUTE_S
    told(recorder)  # notices
    ask(recorder, "late")
    assert "late" not in told(recorder), "the one that leaves must be seen for a while"
    clock.now_s += LEAVES_AFTER_S / 2
    assert "early-7" in told(recorder)
    clock.now_s += LEAVES_AFTER_S / 2
    told(recorder)
    ask(recorder, "early-7")  # comes first, but the place is promised
    ask(recorder, "late", times=3)

    requests = told(recorder)
    assert requests["late"] == 3
    assert "early-7" not in requests
    assert len(requests) == LIMIT + 1


def test_no_count_goes_down_and_nothing_is_counted_twice_while_names_change(clock: Clock) -> None:
    recorder = Recorder(20)
    recorder.busiest = Busiest(20, clock)
    asked, highest, increases = 0, Counter[str](), Counter[str]()
    for minute in range(720):
        clock.now_s += MINUTE_S
        for number in range(10):
            # Another ten every half hour: all of them lose their names, and all come back.
            ask(recorder, f"wave-{minute // 30 % 6}-{number}", times=2)
            asked += 2
        for adapter, count in told(recorder).items():
            assert count >= highest[adapter], adapter
            increases[adapter] += count - highest[adapter]
            highest[adapter] = int(count)

    assert increases.total() == asked
    assert len(highest) == 60 + 1, "every one had a name for a while"
    assert increases[OTHER] < asked / 2


def test_what_an_adapter_did_last_is_still_told_when_it_loses_its_name(recorder: Recorder, clock: Clock) -> None:
    for number in range(LIMIT):
        ask(recorder, f"early-{number}")
    ask(recorder, "late", times=50)
    ask(recorder, "early-3")

    clock.now_s += MINUTE_S

    assert told(recorder)["early-3"] == 2


def test_equal_adapters_don_t_take_each_other_s_names(recorder: Recorder, clock: Clock) -> None:
    for number in range(2 * LIMIT):
        ask(recorder, f"adapter-{number}", times=5)
    before = told(recorder).keys()

    for minute in range(100):
        clock.now_s += MINUTE_S
        for number in range(2 * LIMIT):
            ask(recorder, f"adapter-{number}", times=1 + (number + minute) % 2)
        told(recorder)

    requests = told(recorder)
    assert requests.keys() == before
    assert sum(requests.values()) - requests[OTHER] == LIMIT * (5 + 150), "they are counted under their names all along"


def test_counts_of_adapters_that_are_long_gone_are_forgotten(recorder: Recorder, clock: Clock) -> None:
    for wave in range(40):
        for number in range(LIMIT):
            ask(recorder, f"wave-{wave}-{number}", times=3)
        for _ in range(20):
            clock.now_s += MINUTE_S
            told(recorder)

    assert len(recorder._stores) <= 11 * LIMIT


def test_every_event_has_a_listener_that_counts() -> None:
    listened = {name for name in vars(Events) if not name.startswith("_")}

    assert {name for name in listened if getattr(Recorder, name) is getattr(Events, name)} == set()
    assert isinstance(NOBODY, Events)


def test_loads_are_counted_by_adapter(recorder: Recorder) -> None:
    recorder.loaded(AdapterRevision("pirate", "a" * 64), 0.1, 0.2)
    families = Families({"model_name": "base"})
    recorder.into(families)

    samples = [it for family in families for it in family.samples if it.name == LOADS.name]
    assert [(it.labels, it.value) for it in samples] == [
        ({"model_name": "base", "adapter": "pirate", "outcome": "loaded"}, 1)
    ]
