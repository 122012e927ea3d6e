"""Steps of a long command: one line that changes on a terminal, a line for each step where there is none."""

from __future__ import annotations

import time

from serve.cli.console import err, print_line


class StepProgress:
    """Shows the step that a command is at, with the time since its beginning."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()
        self._step = ""
        self._status = err.status("") if err.is_terminal else None

    def step(self, text: str) -> None:
        """The same step twice in a row is shown once."""
        elapsed_s = time.monotonic() - self._began_s
        if self._status:
            self._status.update(f"{text} … {elapsed_s:.0f} s")
            self._status.start()
        elif text != self._step:
            print_line(f"[{elapsed_s:5.1f} s] {text}")
        self._step = text

    def close(self) -> None:
        if self._status:
            self._status.stop()
