"""Composition root: from settings to a Ray Serve application."""

from __future__ import annotations

from typing import Any

from ray.serve import Application, Deployment

from serve.config import ServeSettings
from serve.deployed import settings_of
from serve.replica import DEPLOYMENT, EngineReplica

IMPORT_PATH = "serve.app:build"
APP_NAME = "graft"
# Ray's line for every request costs as much as all of Graft's own work on it, and goes to a file that nobody reads.
_LOGGING = {"log_level": "WARNING", "enable_access_log": False}


def build(args: dict[str, Any]) -> Application:
    """The builder that Ray Serve imports in its own process; `args` are ServeSettings as plain data,
    or the file that says them."""
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


def deploy_config(settings: ServeSettings) -> dict[str, Any]:
    """The same as Ray Serve's declarative configuration, which updates running replicas in place where it can."""
    return {
        "applications": [
            {
                "name": APP_NAME,
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                "args": settings.model_dump(mode="json"),
                "deployments": [{"name": DEPLOYMENT}],
            }
        ]
    }
