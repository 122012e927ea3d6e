"""The access log: a sample of the successful requests, and all that failed."""

from __future__ import annotations

import logging
import random
import time

from serve.observability.request_record import CLIENT_CLOSED_REQUEST, RequestRecord

logger = logging.getLogger(__name__)


class AccessLog:
    """One line for a request that has ended. It names the caller by a digest or an id, never by a key."""

    def __init__(self, sample: float) -> None:
        """`sample`: share of the responses below 500 that get a line, 0 to 1; those of 500 and more always do."""
        self._sample = sample

    def request_ended(self, record: RequestRecord) -> None:
        failed = record.status >= 500
        if not failed and random.random() >= self._sample:  # noqa: S311  (no secret)
            return
        fields = {
            "event": "request",
            "request_id": record.id,
            "route": record.route,
            "caller": record.caller,
            "adapter": record.answered_by or record.adapter,
            "status": record.status,
            "code": "caller_left" if record.status == CLIENT_CLOSED_REQUEST else record.error,
            "adapter_level": record.level,
            "forwarded": record.forwarded,
            "streamed": record.streamed,
            "waited_s": _rounded(record.waited_s),
            "first_token_s": _rounded(record.first_s - record.began_s if record.first_s and record.streamed else None),
            "duration_s": _rounded(time.monotonic() - record.began_s),
        }
        level = logging.WARNING if failed else logging.INFO
        logger.log(level, "%s %s", record.route, record.status, extra=fields)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
