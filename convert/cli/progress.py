"""How the command line shows the progress of long work: bars on a terminal, lines where standard error is a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from convert.progress import Progress

# A step that goes on gets another line after a quarter of its work or after ten seconds, whichever comes first, and
# never two lines in one second.
_QUARTER = 0.25
_INTERVAL_S = 10.0
_MIN_INTERVAL_S = 1.0


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """A callback that shows progress on standard error."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield ProgressLines(_print_line)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, console=console, transient=True) as bars:
        yield ProgressBars(bars)


class ProgressBars:
    """One bar for each step; a step that begins anew gets its bar back."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, step: str, done: int, total: int) -> None:
        if step not in self._tasks:
            self._tasks[step] = self._bars.add_task(step, total=total)
        self._bars.update(self._tasks[step], completed=done, total=total)


class ProgressLines:
    """A line for each step that begins or is taken up again, and more while it goes on, for a log that people follow.

    `clock` gives seconds.
    """

    def __init__(self, print_line: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._print_line, self._clock = print_line, clock
        self._began_s = clock()
        self._printed_s = self._began_s
        self._printed_share = 0.0
        self._step, self._done = "", 0

    def __call__(self, step: str, done: int, total: int) -> None:
        begins = step != self._step or done < self._done
        self._step, self._done = step, done
        if begins or self._is_due(done, total):
            self._print(step, done, total)

    def _is_due(self, done: int, total: int) -> bool:
        waited_s = self._clock() - self._printed_s
        advanced = done / max(total, 1) - self._printed_share
        return waited_s >= _INTERVAL_S or (waited_s >= _MIN_INTERVAL_S and advanced >= _QUARTER)

    def _print(self, step: str, done: int, total: int) -> None:
        self._printed_s, self._printed_share = self._clock(), done / max(total, 1)
        self._print_line(f"[{self._printed_s - self._began_s:6.1f} s] {step}: {done} of {total}")


def _print_line(line: str) -> None:
    typer.echo(line, err=True)
