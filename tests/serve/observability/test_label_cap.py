from __future__ import annotations

from collections import Counter

import pytest

from serve.names import AdapterRevision
from serve.observability.events import NO_EVENTS, Events
from serve.observability.label_cap import LEAVES_AFTER_S, LabelLimiter
from serve.observability.metric_values import MetricFamilies
from serve.observability.metrics import LOADS, OTHER, REQUESTS
from serve.observability.recorder import Finished, MetricsRecorder
from serve.observability.request_record import RequestRecord

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
def recorder(clock: Clock) -> MetricsRecorder:
    recorder = MetricsRecorder(LIMIT)
    recorder.limiter = LabelLimiter(LIMIT, clock)
    return recorder


def ask(recorder: MetricsRecorder, adapter: str, times: int = 1) -> None:
    for _ in range(times):
        record = RequestRecord("id", "/v1/completions", adapter=adapter, status=200)
        recorder.request_ended(record, is_engine_call=True)
        recorder.engine_finished(Finished(f"{adapter}@0123456789ab", 5, 0, 3, 0.01))


def exported(recorder: MetricsRecorder) -> dict[str, float]:
    """Requests by adapter, as a scrape sees them."""
    families = MetricFamilies({})
    recorder.add_to(families)
    return {
        sample.labels["adapter"]: sample.value
        for family in families
        for sample in family.samples
        if sample.name == REQUESTS.name
    }


def series(recorder: MetricsRecorder) -> int:
    families = MetricFamilies({})
    recorder.add_to(families)
    return sum(len(family.samples) for family in families)


def test_ten_thousand_adapters_make_a_hundred_names(recorder: MetricsRecorder) -> None:
    for number in range(10_000):
        ask(recorder, f"adapter-{number}")

    requests = exported(recorder)
    assert len(requests) == LIMIT + 1
    assert requests[OTHER] == 10_000 - LIMIT
    assert sum(requests.values()) == 10_000
    none, one = MetricsRecorder(LIMIT), MetricsRecorder(LIMIT)
    ask(one, "adapter")
    assert series(recorder) == series(none) + (LIMIT + 1) * (series(one) - series(none))


def test_a_busier_adapter_gets_the_name_of_the_quietest(recorder: MetricsRecorder, clock: Clock) -> None:
    for number in range(LIMIT):
        ask(recorder, f"early-{number}", times=1 if number == 7 else 5)
    ask(recorder, "late", times=50)
    assert "late" not in exported(recorder)

    clock.now_s += MINUTE_S
    exported(recorder)  # notices
    ask(recorder, "late")
    assert "late" not in exported(recorder), "the one that leaves must be seen for a while"
    clock.now_s += LEAVES_AFTER_S / 2
    assert "early-7" in exported(recorder)
    clock.now_s += LEAVES_AFTER_S / 2
    exported(recorder)
    ask(recorder, "early-7")  # comes first, but the place is promised
    ask(recorder, "late", times=3)

    requests = exported(recorder)
    assert requests["late"] == 3
    assert "early-7" not in requests
    assert len(requests) == LIMIT + 1


def test_no_count_goes_down_and_nothing_is_counted_twice_while_names_change(clock: Clock) -> None:
    recorder = MetricsRecorder(20)
    recorder.limiter = LabelLimiter(20, clock)
    asked, highest, increases = 0, Counter[str](), Counter[str]()
    for minute in range(720):
        clock.now_s += MINUTE_S
        for number in range(10):
            # Another ten every half hour: all of them lose their names, and all come back.
            ask(recorder, f"wave-{minute // 30 % 6}-{number}", times=2)
            asked += 2
        for adapter, count in exported(recorder).items():
            assert count >= highest[adapter], adapter
            increases[adapter] += count - highest[adapter]
            highest[adapter] = int(count)

    assert increases.total() == asked
    assert len(highest) == 60 + 1, "every one had a name for a while"
    assert increases[OTHER] < asked / 2


def test_what_an_adapter_did_last_is_still_counted_when_it_loses_its_series(
    recorder: MetricsRecorder, clock: Clock
) -> None:
    for number in range(LIMIT):
        ask(recorder, f"early-{number}")
    ask(recorder, "late", times=50)
    ask(recorder, "early-3")

    clock.now_s += MINUTE_S

    assert exported(recorder)["early-3"] == 2


def test_equal_adapters_don_t_take_each_other_s_names(recorder: MetricsRecorder, clock: Clock) -> None:
    for number in range(2 * LIMIT):
        ask(recorder, f"adapter-{number}", times=5)
    before = exported(recorder).keys()

    for minute in range(100):
        clock.now_s += MINUTE_S
        for number in range(2 * LIMIT):
            ask(recorder, f"adapter-{number}", times=1 + (number + minute) % 2)
        exported(recorder)

    requests = exported(recorder)
    assert requests.keys() == before
    assert sum(requests.values()) - requests[OTHER] == LIMIT * (5 + 150), "they are counted under their names all along"


def test_counts_of_adapters_that_are_long_gone_are_forgotten(recorder: MetricsRecorder, clock: Clock) -> None:
    for wave in range(40):
        for number in range(LIMIT):
            ask(recorder, f"wave-{wave}-{number}", times=3)
        for _ in range(20):
            clock.now_s += MINUTE_S
            exported(recorder)

    assert len(recorder._by_label) <= 11 * LIMIT


def test_every_event_has_a_listener_that_counts() -> None:
    listened = {name for name in vars(Events) if not name.startswith("_")}

    assert {name for name in listened if getattr(MetricsRecorder, name) is getattr(Events, name)} == set()
    assert isinstance(NO_EVENTS, Events)


def test_loads_are_counted_by_adapter(recorder: MetricsRecorder) -> None:
    recorder.loaded(AdapterRevision("pirate", "a" * 64), 0.1, 0.2)
    families = MetricFamilies({"model_name": "base"})
    recorder.add_to(families)

    samples = [sample for family in families for sample in family.samples if sample.name == LOADS.name]
    assert [(sample.labels, sample.value) for sample in samples] == [
        ({"model_name": "base", "adapter": "pirate", "outcome": "loaded"}, 1)
    ]
