"""What a person who follows a log sees of long work."""

from __future__ import annotations

from convert.cli.progress import ProgressLines


class Log:
    """The lines that were printed, by a clock that the test sets."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.lines: list[str] = []
        self.show = ProgressLines(self.lines.append, lambda: self.now_s)

    def after(self, seconds: float, step: str, done: int, total: int) -> list[str]:
        """The lines that one call prints, without the time."""
        self.now_s += seconds
        before = len(self.lines)
        self.show(step, done, total)
        return [line.partition("] ")[2] for line in self.lines[before:]]


def test_every_step_gets_a_line_when_it_begins() -> None:
    log = Log()

    assert log.after(0.0, "writing weights", 0, 8) == ["writing weights: 0 of 8"]
    assert log.after(0.1, "measuring the result", 0, 3) == ["measuring the result: 0 of 3"]
    assert log.lines[1] == "[   0.1 s] measuring the result: 0 of 3"


def test_a_step_of_a_second_gets_no_more_lines() -> None:
    log = Log()

    lines = [log.after(0.01, "writing weights", done, 50) for done in range(51)]

    assert [line for line in lines if line] == [["writing weights: 0 of 50"]]


def test_a_step_that_goes_on_gets_a_line_for_each_quarter() -> None:
    log = Log()

    lines = [line for done in range(13) for line in log.after(2.0, "measuring the result", done, 12)]

    assert lines == [f"measuring the result: {done} of 12" for done in (0, 3, 6, 9, 12)]


def test_a_slow_step_gets_a_line_every_ten_seconds() -> None:
    log = Log()

    lines = [line for done in range(13) for line in log.after(6.0, "measuring the result", done, 1000)]

    assert lines == [f"measuring the result: {done} of 1000" for done in (0, 2, 4, 6, 8, 10, 12)]


def test_the_same_step_of_the_next_variant_begins_anew() -> None:
    log = Log()
    log.after(0.0, "measuring the result", 0, 3)
    log.after(0.1, "measuring the result", 3, 3)

    assert log.after(0.1, "measuring the result", 0, 3) == ["measuring the result: 0 of 3"]


def test_the_count_of_variants_is_shown_with_every_variant() -> None:
    log = Log()
    log.after(0.0, "variants compared", 0, 8)
    log.after(0.1, "measuring the result", 0, 3)

    assert log.after(0.1, "variants compared", 1, 8) == ["variants compared: 1 of 8"]
