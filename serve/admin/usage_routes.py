"""The call of the admin API that reports usage."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, date, datetime

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serve.admin.routes import Admin
from serve.callers.usage import Meter
from serve.errors import InvalidBody

_MAX_DAYS = 366


@dataclass(frozen=True)
class UsageRoutes:
    """GET /admin/v1/usage."""

    admin: Admin
    meter: Meter

    def routes(self) -> list[Route]:
        return [Route("/admin/v1/usage", self.usage, methods=["GET"])]

    async def usage(self, request: Request) -> Response:
        """Usage from `since` to `until`, days in UTC such as 2026-01-31, both included; by default today."""
        self.admin.caller(request)
        today = datetime.now(UTC).date()
        until = _day(request, "until", today)
        since = _day(request, "since", until)
        if not 0 <= (until - since).days < _MAX_DAYS:
            raise InvalidBody(f"`since` must be before `until`, by less than {_MAX_DAYS} days.")
        rows = await asyncio.to_thread(self.meter.read, since, until)
        return JSONResponse({"since": str(since), "until": str(until), "usage": rows})


def _day(request: Request, name: str, default: date) -> date:
    value = request.query_params.get(name)
    if value is None:
        return default
    try:
        return date.fromisoformat(value)
    except ValueError:
        raise InvalidBody(f"`{name}` must be a day, as 2026-01-31.") from None
