"""Applies `adapters.yaml` to the running server whenever what it says changes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from convert.errors import ConvertError
from serve.desired import Desired, apply, diff, manifests
from serve.errors import EngineUnavailable, ReplicaUnreachable, ServeError, ServerNotRunning, StoreUnavailable
from serve.remote import AdminClient

POLL_S = 1.0
_RETRY_S = 10.0
_PASSING = {it.code for it in (StoreUnavailable, ReplicaUnreachable, EngineUnavailable, ServerNotRunning)}
_APPLIED = "adapters.applied"

# Told a line for a person.
Tell = Callable[[str], None]


class Watcher:
    """Looks once a second at the times of the file and of the manifests it names; reads them when one changed.

    What was applied last is remembered in the state directory: a rollback that someone made by hand since then is
    not undone by a restart, but by the next change of the file.
    """

    def __init__(self, path: Path, client: AdminClient, tell: Tell) -> None:
        self._path = path
        self._client = client
        self._tell = tell
        self._applied = client.state.root / _APPLIED
        self._watched: list[Path] = [path]
        self._seen: object = None
        self._retry_at: float | None = None

    def look(self) -> None:
        """Apply the file if it, or an artifact it names, has changed since the last look. Never raises: what is
        wrong is told, and tried again when it changes, or soon if that may help."""
        due = self._retry_at is not None and time.monotonic() > self._retry_at
        if not due and [_time(it) for it in self._watched] == self._seen:
            return
        self._retry_at = None
        try:
            self._follow()
        except (ServeError, ConvertError) as error:
            self._fail(str(self._path), error)
        self._seen = [_time(it) for it in self._watched]

    def _follow(self) -> None:
        desired = Desired.read(self._path)
        self._watched = [self._path, *manifests(desired)]
        if self._applied.is_file() and self._applied.read_text() == desired.digest:
            return
        steps = diff(desired, self._client.adapters())
        failed = apply(desired, steps, self._client)
        for step, error in failed.items():
            self._fail(str(step), error)
        if not failed:
            self._applied.write_text(desired.digest)
            self._tell(f"{self._path} applied: {', '.join(map(str, steps)) or 'nothing to change'}")

    def _fail(self, what: str, error: ServeError | ConvertError) -> None:
        self._tell(f"{what} was not applied: error[{error.code}]: {error}")
        if error.code in _PASSING:
            self._retry_at = time.monotonic() + _RETRY_S


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Look every second in a thread of its own."""
    stopping = threading.Event()

    def run() -> None:
        while not stopping.is_set():
            watcher.look()
            stopping.wait(POLL_S)

    thread = threading.Thread(target=run, name="adapters.yaml", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join(timeout=POLL_S)


def _time(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
