"""Limits for what an untrusted file makes a library do: a pattern that backtracks without end, a chat template that
loops or fills the memory."""

from __future__ import annotations

import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# 0 would switch the timer off.
_SHORTEST_S = 1e-3
_UNLIMITED = resource.RLIM_INFINITY


class TimeLimitExceeded(BaseException):
    """The work was ended. The message tells the limit.

    No Exception: Jinja, for one, passes over those of an expression, and would go on.
    """


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeLimitExceeded in the body once this thread has computed for that long; waiting does not count, so that
    a busy machine changes nothing.

    Only the main thread can be interrupted: in another one there is no limit. Uses SIGALRM, whose handler and timer are
    as before afterwards.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    end, begun = time.thread_time() + seconds, time.monotonic()

    def interrupt(*_: object) -> None:
        if (rest := end - time.thread_time()) > 0:
            signal.setitimer(signal.ITIMER_REAL, max(rest, _SHORTEST_S))
        else:
            raise TimeLimitExceeded(f"more than {seconds:g} s of computing")

    handler = signal.signal(signal.SIGALRM, interrupt)
    delay, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)
        if delay:
            signal.setitimer(signal.ITIMER_REAL, max(delay - (time.monotonic() - begun), _SHORTEST_S), interval)


@contextmanager
def memory_limit(more_bytes: int) -> Iterator[None]:
    """Python raises MemoryError in the body where this process would take that many bytes more than it has now.

    The limit is that of the system for the whole process: no other thread should need much memory meanwhile.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    data_pages = int(Path("/proc/self/statm").read_text().split()[5])
    limit = data_pages * resource.getpagesize() + more_bytes
    if hard != _UNLIMITED:
        limit = min(limit, hard)
    if soft == _UNLIMITED or limit < soft:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
