"""Composition root: from settings to a Ray Serve application."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.serve import Application, Deployment

from serve.deployment.ray_replicas import DEPLOYMENT
from serve.deployment.replica import EngineReplica
from serve.deployment.settings_file import settings_of
from serve.settings import ServeSettings

IMPORT_PATH = "serve.deployment.app:build"
# Ray's line for every request costs as much as all of Graft's own work on it, and goes to a file that nobody reads.
_LOGGING = {"log_level": "WARNING", "enable_access_log": False}


def build(args: dict[str, Any]) -> Application:
    """The application builder, which Ray Serve imports in a process of its own. `args`: see `settings_of`."""
    settings = settings_of(args)
    deployment: Deployment = EngineReplica  # what the decorator makes of the class
    return deployment.options(
        num_replicas=settings.replicas,
        max_ongoing_requests=settings.max_ongoing_requests,
        graceful_shutdown_timeout_s=settings.drain_s,
        logging_config=_LOGGING,
        health_check_period_s=2,
        health_check_timeout_s=10,
        ray_actor_options={"num_cpus": settings.cpus_per_replica, "num_gpus": settings.gpus_per_replica},
    ).bind(settings.model_dump(mode="json"))


def deploy_config(pools: Sequence[ServeSettings]) -> dict[str, Any]:
    """The applications, one for each pool, as Ray Serve's declarative configuration, with which Ray Serve can update
    running replicas in place."""
    return {
        "applications": [
            {
                "name": settings.application,
                "route_prefix": settings.route_prefix,
                "import_path": IMPORT_PATH,
                "args": settings.model_dump(mode="json"),
                "deployments": [{"name": DEPLOYMENT}],
            }
            for settings in pools
        ]
    }
