"""The usage of callers: requests and tokens by day, key and model, written to the store every few seconds.

A replica writes for each day one object with all that it has counted on that day, and then deletes the object that it
wrote before. A reader takes the newest object of each replica, so nothing is counted twice, whatever fails between the
two steps. A replica that is killed loses its counts since its last write. The objects are in the store of the
catalogue.
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

from serve.catalogue.storage.object_store import ObjectStore
from serve.engine.token_counter import Tokens
from serve.errors import StoreUnavailable

_PREFIX = "usage"
_NO_KEY = "-"  # if the server requires no keys
_LISTINGS = 3  # an object may be deleted after it was listed and before it is read; then its successor is listed

logger = logging.getLogger(__name__)


@dataclass
class UsageTotals:
    """Totals of requests. The names of the fields are those of the admin API."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, other: UsageTotals) -> None:
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens


_TotalsByKeyAndModel = dict[tuple[str, str], UsageTotals]


class Meter:
    """Counts the usage of one replica."""

    def __init__(self, objects: ObjectStore, flush_s: float) -> None:
        self._objects = objects
        self._flush_s = flush_s
        self._replica = uuid.uuid4().hex[:16]
        self._written = 0
        self._totals: dict[date, _TotalsByKeyAndModel] = {}
        self._changed: set[date] = set()  # days with totals that are not written yet
        self._current_keys: dict[date, str] = {}  # of the object that holds each day
        self._flushing: asyncio.Task[None] | None = None
        self._flush_lock = threading.Lock()

    def start(self) -> None:
        """Write every `flush_s` seconds from now on."""
        self._flushing = asyncio.create_task(self._flush_periodically())

    async def stop(self) -> None:
        """Write the remaining totals, and end. Raises StoreUnavailable."""
        if self._flushing:
            self._flushing.cancel()
        await asyncio.to_thread(self.flush)

    def add(self, key: str | None, model: str, tokens: Tokens) -> None:
        """Count a request that has ended."""
        today = datetime.now(UTC).date()
        totals = self._totals.setdefault(today, defaultdict(UsageTotals))
        totals[key or _NO_KEY, model].add(UsageTotals(1, tokens.prompt, tokens.completion))
        self._changed.add(today)

    def read(self, since: date, until: date) -> list[dict[str, Any]]:
        """`read_usage`, including all that this replica has counted. Raises StoreUnavailable."""
        self.flush()
        return read_usage(self._objects, since, until)

    def flush(self) -> None:
        """Write the days that have changed. Raises StoreUnavailable; then the next call writes what is left."""
        with self._flush_lock:
            for day in sorted(self._changed):
                self._changed.discard(day)
                try:
                    self._write(day)
                except BaseException:
                    self._changed.add(day)
                    raise
            self._forget_past_days()

    def _write(self, day: date) -> None:
        rows = [[*names, *vars(totals).values()] for names, totals in list(self._totals[day].items())]
        self._written += 1
        key = f"{_PREFIX}/{day}/{self._replica}-{self._written:010d}"
        self._objects.create(key, json.dumps(rows).encode())
        previous, self._current_keys[day] = self._current_keys.get(day), key
        if previous:
            self._objects.delete(previous)

    def _forget_past_days(self) -> None:
        """Free the memory of days that are written, and to which nothing is added any more."""
        today = datetime.now(UTC).date()
        for day in [day for day in self._totals if day < today and day not in self._changed]:
            del self._totals[day]
            self._current_keys.pop(day, None)

    async def _flush_periodically(self) -> None:
        failing = False
        while True:
            await asyncio.sleep(self._flush_s)
            try:
                await asyncio.to_thread(self.flush)
                failing = False
            except Exception as error:  # any error may be over at the next attempt
                if not failing:
                    unexpected = None if isinstance(error, StoreUnavailable) else error
                    logger.error("usage can't be written, it stays in memory: %s", error, exc_info=unexpected)
                failing = True


def read_usage(objects: ObjectStore, since: date, until: date) -> list[dict[str, Any]]:
    """One row for each day, key and model, both days included. Raises StoreUnavailable."""
    days = (since + timedelta(days=number) for number in range((until - since).days + 1))
    return [
        {"day": str(day), "key": key, "model": model, **vars(totals)}
        for day in days
        for (key, model), totals in sorted(_totals_of_day(objects, day).items())
    ]


def _totals_of_day(objects: ObjectStore, day: date) -> _TotalsByKeyAndModel:
    totals: _TotalsByKeyAndModel = defaultdict(UsageTotals)
    for rows in _newest_objects(objects, f"{_PREFIX}/{day}"):
        for key, model, *numbers in rows:
            totals[key, model].add(UsageTotals(*numbers))
    return totals


def _newest_objects(objects: ObjectStore, prefix: str) -> Iterable[list[list[Any]]]:
    """The rows of the newest object of each replica."""
    rows_by_replica: dict[str, list[list[Any]]] = {}
    for _ in range(_LISTINGS):
        # The names are sorted, so the last one of a replica has the highest number.
        newest = {name.rpartition("-")[0]: name for name in objects.names(prefix)}
        for replica, name in newest.items():
            if replica in rows_by_replica:
                continue
            if (content := objects.read(f"{prefix}/{name}")) is not None:
                rows_by_replica[replica] = json.loads(content)
    return rows_by_replica.values()
