"""The environment variables that Ray, Ray Serve, HAProxy and vLLM run with on one machine.

Ray reads its variables when it is imported, and silently ignores those that it does not know: `ignored_variables` finds
them.
"""

from __future__ import annotations

import math
import mmap
import os
import secrets
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from serve.deployment.ports import free_block
from serve.deployment.proxy.environment import map_of_models, proxy_directory, proxy_environment, proxy_program
from serve.settings import ServeSettings

# Where Ray reads environment variables: its Python source, and its native code.
_SOURCES_OF_RAY = (
    *("serve/_private/*.py", "_private/**/*.py", "_common/**/*.py"),
    *("core/src/ray/raylet/raylet", "_raylet.so"),
)
# Most are for replicas: one that replaces another gets a new port, and the old port is blocked for some minutes.
_PORTS = 100
SINGLE_NODE = {
    # No other node waits for news of free resources.
    "RAY_raylet_report_resources_period_milliseconds": "1000",
    "RAY_event_stats": "0",
    # Ray has no cluster then: its node has the loopback address, and its processes listen there only. Elsewhere Ray
    # replaces a loopback address by the machine's, and listens on every interface.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # When the machine runs short of memory, Ray's monitor would kill engines, controller and limits at once, also if
    # another program uses it. Without the monitor the kernel ends one process, the one that uses most.
    "RAY_memory_monitor_refresh_ms": "0",
    # By default 1000, with which the kernel would end engines first, however little they use.
    "RAY_worker_oom_score_adjustment": "0",
}


def environment(directory: Path, settings: ServeSettings) -> dict[str, str]:
    """The variables by name, with files and sockets below `directory`. They must be set before Ray is imported; child
    processes inherit them."""
    return {
        **_ray_environment(),
        **proxy_environment(proxy_directory(directory), settings),
        **proxy_program(),
        **_ports(),
        # Graft's own variables: for `proxy/haproxy.sh`, and the sockets for the replicas (`proxy/uvicorn_patches`).
        "GRAFT_SOCKETS": str(directory / "sockets"),
        "GRAFT_METRICS": str(settings.metrics.directory or ""),
        "GRAFT_BODY_TIMEOUT_S": str(math.ceil(settings.gateway.body_timeout_s)),
        "GRAFT_POOLS": str(map_of_models(directory)),
        **_vllm_environment(replica_cpus=max(1, (os.cpu_count() or 1) // settings.all_engines)),
    }


def _ray_environment() -> dict[str, str]:
    return {
        # One event loop in the process that holds the engine.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        # Ray's background work: a control loop that runs less often than ten times a second, and no metrics of Ray
        # itself, which would be served at a port that nobody knows.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
        "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000",
        "RAY_enable_metrics_collection": "0",
        **SINGLE_NODE,
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        # A new token for each run; without one Ray writes a token into the home directory.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        # To Ray, engines and proxy are workers, which it starts with a lower priority than other processes have.
        "RAY_worker_niceness": "0",
        # A busy machine may take longer than the default 15 s to start Ray's agent.
        "RAY_raylet_start_wait_time_s": "120",
    }


def _ports() -> dict[str, str]:
    """Ports between the parts of one server. Ray's defaults are the same for every server of a machine, and two servers
    can listen on one port: then the wrong server would answer a request."""
    metrics, stats, fallback, *replicas = free_block(_PORTS)
    return {
        # `haproxy.sh` turns these two off; an administrator's own HAProxy runs without the script.
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(replicas[0]),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(replicas[-1]),
    }


def _vllm_environment(replica_cpus: int) -> dict[str, str]:
    return {
        "VLLM_NO_USAGE_STATS": "1",
        # OpenAI's bound for `n`; vLLM's is 16384.
        "VLLM_MAX_N_SEQUENCES": os.environ.get("VLLM_MAX_N_SEQUENCES", "128"),
        "VLLM_HOST_IP": "127.0.0.1",
        # vLLM would call dictConfig, which closes every log handler of the process, also Ray Serve's. A replica without
        # that handler is stopped when the controller restarts.
        "VLLM_CONFIGURE_LOGGING": "0",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        # The model is a directory on this machine: no library may ask the Hugging Face hub.
        "HF_HUB_OFFLINE": "1",
        # The rest has an effect on a CPU only. Keep the worker in the engine process: less memory, and no busy waiting
        # between two processes.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # Two replicas would both bind their threads to the first core.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(replica_cpus)),
    }


def ignored_variables(names: Iterable[str]) -> list[str]:
    """The RAY_ variables among `names` that the installed Ray reads nowhere: neither its Python source nor its native
    code contains their names. Doesn't import Ray."""
    unread = {name for name in names if name.startswith("RAY_")}
    for source in _ray_sources():
        if not unread:
            break
        with source.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            unread -= {name for name in unread if _names(content, name.encode())}
    return sorted(unread)


def _ray_sources() -> Iterator[Path]:
    spec = find_spec("ray")
    for root in map(Path, spec.submodule_search_locations or () if spec else ()):
        for pattern in _SOURCES_OF_RAY:
            yield from (path for path in root.glob(pattern) if path.stat().st_size)


def _names(content: mmap.mmap, name: bytes) -> bool:
    """Whether `content` contains the name as a whole word."""
    start = content.find(name)
    while start >= 0:
        around = content[max(0, start - 1) : start] + content[start + len(name) : start + len(name) + 1]
        if not any(byte == ord("_") or chr(byte).isalnum() for byte in around):
            return True
        start = content.find(name, start + 1)
    return False
