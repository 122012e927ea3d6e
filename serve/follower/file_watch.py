"""Watches `adapters.yaml` and applies it to the running server whenever its content changes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from convert.errors import ConvertError
from serve.errors import (
    EngineUnavailable,
    PoolRefused,
    ReplicaUnreachable,
    ServeError,
    ServerNotRunning,
    StoreUnavailable,
)
from serve.follower.admin_client import AdminClient
from serve.follower.applied_mark import AppliedMark
from serve.follower.applied_metric import AppliedMetric
from serve.follower.desired_state import DesiredState, apply, manifests_named_in, steps_to

POLL_S = 1.0
_RETRY_S = 10.0
_TRANSIENT = {
    error.code for error in (StoreUnavailable, ReplicaUnreachable, EngineUnavailable, ServerNotRunning, PoolRefused)
}

logger = logging.getLogger(__name__)

# Prints one line for the user.
Print = Callable[[str], None]


class FileWatcher:
    """Applies the file when it, or a manifest of an artifact that it names, has changed.

    The state records what was applied last (`AppliedMark`). A restart therefore does not undo a rollback that somebody
    made by hand; the next change of the file does.
    """

    def __init__(self, path: Path, client: AdminClient, print_line: Print, metrics: Path | None = None) -> None:
        """`metrics`: the directory of an exporter, which then shows whether the file was applied."""
        self._path = path
        self._client = client
        self._print = print_line
        self._applied = AppliedMark(client.state)
        self._metric = AppliedMetric(metrics)
        self._watched: list[Path] = [path]
        self._last_stamps: list[tuple[int, int] | None] | None = None
        self._retry_at: float | None = None
        self._attempts = 0  # since the file was last applied
        self._said: set[str] = set()  # lines about why they failed

    def poll(self) -> None:
        """Applies the file if something changed since the last call. Raises nothing: an error is printed, once, and the
        file is applied again when it changes, or after a while if the error may be over by then."""
        retry_is_due = self._retry_at is not None and time.monotonic() > self._retry_at
        has_changed = self._stamps() != self._last_stamps
        if not retry_is_due and not has_changed:
            return
        if has_changed:
            self._said.clear()
        self._retry_at = None
        self._attempts += 1
        try:
            self._watched = [self._path, *manifests_named_in(self._path)]
            # Before the file is read: what changes while it is applied, which may take minutes, is seen afterwards.
            self._last_stamps = self._stamps()
            self._apply()
        except (ServeError, ConvertError) as error:
            self._report(str(self._path), error)
        except Exception as error:  # whatever it is, the next change of the file must still be seen
            logger.debug("could not apply %s", self._path, exc_info=True)
            self._metric.write(is_applied=False)
            self._say(f"{self._path} was not applied, trying again every {_RETRY_S:g} s: {error!r}")
            self._retry_at = time.monotonic() + _RETRY_S

    def _apply(self) -> None:
        desired = DesiredState.read(self._path)
        if self._applied.read() == desired.digest:
            self._succeed("nothing to change")
            return
        steps = steps_to(desired, self._client)
        failed = apply(desired, steps, self._client)
        for step, error in failed.items():
            self._report(str(step), error)
        if not failed:
            self._applied.write(desired.digest)
            self._succeed(", ".join(map(str, steps)) or "nothing to change", is_news=True)

    def _succeed(self, result: str, is_news: bool = False) -> None:
        self._metric.write(is_applied=True)
        failures = self._attempts - 1
        if is_news or failures:
            self._say(
                f"{self._path} applied: {result}" + (f" (failed attempts before: {failures})" if failures else "")
            )
        self._attempts = 0
        self._said.clear()

    def _report(self, subject: str, error: ServeError | ConvertError) -> None:
        self._metric.write(is_applied=False)
        self._say(f"{subject} was not applied: error[{error.code}]: {error}")
        if error.code in _TRANSIENT or isinstance(error.__cause__, OSError):
            self._retry_at = time.monotonic() + _RETRY_S

    def _say(self, line: str) -> None:
        """Prints a line that was not printed since the last change. Printing fails where nobody can read it, as after a
        terminal was closed; the file is followed all the same."""
        if line in self._said:
            return
        self._said.add(line)
        try:
            self._print(line)
        except Exception:
            logger.debug("could not print: %s", line, exc_info=True)

    def _stamps(self) -> list[tuple[int, int] | None]:
        return [_stamp(path) for path in self._watched]


@contextmanager
def watch_in_thread(watcher: FileWatcher) -> Iterator[None]:
    """Polls every POLL_S seconds in a thread of its own."""
    stopping = threading.Event()

    def run() -> None:
        while not stopping.is_set():
            watcher.poll()
            stopping.wait(POLL_S)

    thread = threading.Thread(target=run, name="adapters.yaml", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join(timeout=POLL_S)


def _stamp(path: Path) -> tuple[int, int] | None:
    """Modification time in nanoseconds and size; None if there is no such file, or none can have that name."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_mtime_ns, status.st_size
