"""Who used what: requests and tokens by day, key and model, written down every few seconds.

A replica writes, for each day, all that it has counted on it so far, as one object that replaces the one before. So
nothing is ever counted twice, whatever fails between the two steps, and a replica that is killed loses what it counted
since it last wrote. Objects are those of the catalogue: files, or an object store.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import uuid
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

from serve.errors import StoreUnavailable
from serve.objects import Objects
from serve.tokens import Tokens

_PREFIX = "usage"
_NO_KEY = "-"  # where callers need none
_READS = 3  # an object that was listed may be replaced before it is read

logger = logging.getLogger(__name__)


@dataclass
class Amount:
    """What was used."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, other: Amount) -> None:
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens


_Counted = dict[tuple[str, str], Amount]  # by key and model


class Meter:
    """Counts for one replica."""

    def __init__(self, objects: Objects, flush_s: float) -> None:
        self._objects = objects
        self._flush_s = flush_s
        self._replica = uuid.uuid4().hex[:16]
        self._written = 0
        self._days: dict[date, _Counted] = {}
        self._changed: set[date] = set()
        self._last: dict[date, str] = {}  # the object that holds each day now
        self._loop: asyncio.Task[None] | None = None
        self._writing = threading.Lock()

    def start(self) -> None:
        """Write now and then from here on."""
        self._loop = asyncio.create_task(self._write_often())

    def stop(self) -> None:
        """Write what there is, now."""
        if self._loop:
            self._loop.cancel()
        self.flush()

    def add(self, key: str | None, model: str, tokens: Tokens) -> None:
        """One request has ended."""
        today = datetime.now(UTC).date()
        counted = self._days.setdefault(today, defaultdict(Amount))
        counted[key or _NO_KEY, model].add(Amount(1, tokens.prompt, tokens.completion))
        self._changed.add(today)

    def read(self, since: date, until: date) -> list[dict[str, Any]]:
        """`read_usage`, with all that this replica knows."""
        self.flush()
        return read_usage(self._objects, since, until)

    def flush(self) -> None:
        """Raises StoreUnavailable; then nothing is lost, and the next call tries again."""
        with self._writing:
            for day in sorted(self._changed):
                self._changed.discard(day)
                try:
                    self._write(day)
                except BaseException:
                    self._changed.add(day)
                    raise
            today = datetime.now(UTC).date()
            for day in [day for day in self._days if day < today and day not in self._changed]:
                del self._days[day]  # nothing is added to it any more
                self._last.pop(day, None)

    def _write(self, day: date) -> None:
        rows = [[*names, *vars(amount).values()] for names, amount in list(self._days[day].items())]
        self._written += 1
        key = f"{_PREFIX}/{day}/{self._replica}-{self._written:010d}"
        self._objects.create(key, json.dumps(rows).encode())
        before, self._last[day] = self._last.get(day), key
        if before:
            self._objects.delete(before)

    async def _write_often(self) -> None:
        failing = False
        while True:
            await asyncio.sleep(self._flush_s)
            try:
                await asyncio.to_thread(self.flush)
                failing = False
            except StoreUnavailable as error:
                if not failing:
                    logger.error("usage can't be written down, it is kept in memory: %s", error)
                failing = True


def read_usage(objects: Objects, since: date, until: date) -> list[dict[str, Any]]:
    """One row for each day, key and model, both days included. Raises StoreUnavailable."""
    days = (since + timedelta(days=number) for number in range((until - since).days + 1))
    return [
        {"day": str(day), "key": key, "model": model, **vars(amount)}
        for day in days
        for (key, model), amount in sorted(_day(objects, day).items())
    ]


def _day(objects: Objects, day: date) -> _Counted:
    total: _Counted = defaultdict(Amount)
    for rows in _latest(objects, f"{_PREFIX}/{day}"):
        for key, model, *amounts in rows:
            total[key, model].add(Amount(*amounts))
    return total


def _latest(objects: Objects, prefix: str) -> Iterable[list[list[Any]]]:
    """What each replica wrote last."""
    found: dict[str, list[list[Any]]] = {}
    for _ in range(_READS):
        last = {name.rpartition("-")[0]: name for name in objects.names(prefix)}  # sorted: the highest number stays
        missing = {replica: name for replica, name in last.items() if replica not in found}
        for replica, name in missing.items():
            if (content := objects.read(f"{prefix}/{name}")) is not None:
                found[replica] = json.loads(content)
    return found.values()
