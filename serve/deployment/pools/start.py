"""Waits for the engines of the pools that a server is started with."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from serve.deployment.pools.application_status import (
    RUNNING,
    attempt_failed,
    cannot_start,
    ready_replicas,
    reason_of,
)
from serve.errors import EngineStartFailed

_POLL_S = 0.2

# Called with the step that the start is at, in words.
Progress = Callable[[str], None]

logger = logging.getLogger(__name__)


def wait_until_running(
    overviews: Callable[[], Mapping[str, Any]], names: Mapping[str, str], engines: int, progress: Progress
) -> None:
    """`names`: the base model of each application. Raises EngineStartFailed if one of them can't start."""
    reported: dict[str, str] = {}
    while True:
        known = overviews()
        applications = {name: known[name] for name in names if name in known}
        for name, application in applications.items():
            _check_start(application, names[name] if len(names) > 1 else "", reported)
        if len(applications) == len(names) and all(each.status == RUNNING for each in applications.values()):
            return
        if applications:
            ready = sum(map(ready_replicas, applications.values()))
            progress(f"{ready} of {engines} engines are ready")
        time.sleep(_POLL_S)


def _check_start(application: Any, model: str, reported: dict[str, str]) -> None:
    """Raises EngineStartFailed if the application can't start. Warns of an attempt that failed, unless that is what was
    `reported` for the model last."""
    if application.status == RUNNING:
        return
    of_model = f" of {model}" if model else ""
    reason = reason_of(application)
    if cannot_start(application):
        raise EngineStartFailed(f"The engine{of_model} did not start: {reason}")
    if attempt_failed(application) and reason != reported.get(model):
        logger.warning("Warning: an engine%s did not start, and is tried again: %s", of_model, reason)
        reported[model] = reason
