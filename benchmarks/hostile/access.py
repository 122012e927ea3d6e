"""Calls of the admin API by callers without a token: none may be accepted."""

from __future__ import annotations

import httpx

from benchmarks.hostile.cases import CaseResult
from benchmarks.progress import step
from serve.follower.http_client import direct_async_client

_TIMEOUT_S = 20.0
# Empty, and what a script sends whose variable was never set.
_AUTHORIZATIONS = (
    *(None, "", "Bearer", "Bearer ", "bearer", "Bearer \t", "Bearer  x", "Basic", "Basic Og==", "Bearer null"),
    *("Bearer None", "Bearer undefined", "Bearer $GRAFT_ADMIN_TOKEN", "Bearer ${TOKEN}", 'Bearer ""', "Bearer \x00"),
)
_CALLS = (
    *(("GET", path) for path in ("/admin/v1/adapters", "/admin/v1/history", "/admin/v1/replicas", "/admin/v1/usage")),
    *(("DELETE", "/admin/v1/adapters/french"), ("POST", "/admin/v1/adapters/french/rollback")),
    *(("POST", "/admin/v1/adapters"), ("POST", "/v1/load_lora_adapter"), ("POST", "/v1/unload_lora_adapter")),
)
_SURFACE = "admin API without a token"


async def attack_without_token(url: str) -> list[CaseResult]:
    step(f"{_SURFACE}: {len(_CALLS) * len(_AUTHORIZATIONS)} requests")
    async with direct_async_client(base_url=url, timeout=_TIMEOUT_S) as client:
        return [
            await _call(client, method, path, authorization)
            for method, path in _CALLS
            for authorization in _AUTHORIZATIONS
        ]


async def _call(client: httpx.AsyncClient, method: str, path: str, authorization: str | None) -> CaseResult:
    headers = {} if authorization is None else {"authorization": authorization}
    shown = f"{method} {path} {headers}"
    try:
        answer = await client.request(method, path, headers=headers, content=b"{}")
    except httpx.TimeoutException:
        return CaseResult(_SURFACE, "hung", shown)
    except (httpx.TransportError, ValueError):
        return CaseResult(_SURFACE)  # the client or the proxy refused it
    if answer.status_code in (400, 401):
        return CaseResult(_SURFACE)
    return CaseResult(
        _SURFACE, "crashed" if answer.is_server_error else "accepted", f"{answer.status_code} for {shown}"
    )
