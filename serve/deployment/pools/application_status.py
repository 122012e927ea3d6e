"""What Ray Serve says of a pool's application: how far its engines are, and why one did not start."""

from __future__ import annotations

from typing import Any

from serve.admin.pool_routes import PoolState
from serve.errors import EngineRefused, EngineStartFailed

RUNNING = "RUNNING"
_ENDED = ("DEPLOY_FAILED", "UNHEALTHY")
_TRACEBACK = "Traceback (most recent call last):"
# How the last line of a traceback begins.
_REFUSED, _FAILED = (f"{kind.__module__}.{kind.__name__}: " for kind in (EngineRefused, EngineStartFailed))


def state_of(application: Any) -> PoolState:
    """`application`: its status by Ray Serve; None where Ray Serve does not know it yet."""
    if application is None:
        return "starting"
    if application.status == "DELETING":
        return "stopping"
    if application.status == RUNNING:
        return "running"
    return "failed" if cannot_start(application) else "starting"


def cannot_start(application: Any) -> bool:
    """Whether Ray Serve has given up on the engines, or no further attempt can help."""
    return application.status in _ENDED or _last_line(application).startswith(_REFUSED)


def reason_of(application: Any) -> str:
    """The exception that ended the last attempt to start an engine, without its class."""
    return _last_line(application).removeprefix(_REFUSED).removeprefix(_FAILED)


def attempt_failed(application: Any) -> bool:
    """Whether an engine did not start, and is or was tried again."""
    return _TRACEBACK in _message(application)


def ready_replicas(application: Any) -> int:
    deployments = application.deployments.values() if application else ()
    return sum(int(deployment.replica_states.get(RUNNING, 0)) for deployment in deployments)


def _message(application: Any) -> str:
    """What Ray Serve says of the application: a traceback, once an engine did not start."""
    messages = [application.message, *(deployment.message for deployment in application.deployments.values())]
    return str(max(messages, key=len))


def _last_line(application: Any) -> str:
    return _message(application).strip().rpartition("\n")[2]
