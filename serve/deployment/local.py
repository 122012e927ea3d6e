"""A server with a private Ray on this machine, as `run` starts it.

Ray reads its environment when it is imported, so this module imports Ray only after it has set `environment`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from serve.catalogue.state_dir import StateDir
from serve.deployment.background import repeated
from serve.deployment.pools.controller import PoolController
from serve.deployment.pools.start import Progress, wait_until_running
from serve.deployment.ports import check_port, free_port
from serve.deployment.proxy.environment import map_of_models, proxy_directory
from serve.deployment.proxy.proxy_map import ProxyMap
from serve.deployment.ray_environment import environment, ignored_variables
from serve.errors import EngineStartFailed, NodeLost, PortInUse
from serve.follower.http_client import direct_client
from serve.observability.exporter import DEFAULT_PORT
from serve.observability.memory import MemoryWatch, memory_left
from serve.settings import ServeSettings

_POLL_S = 0.2
_NODE_POLL_S = 1.0
_RAY_PROCESSES = frozenset({"raylet", "gcs_server"})
_SOCKETS = shutil.ignore_patterns("*.sock")
_PROXY_TIMEOUT_S = 60
# Ray's own sockets live below its directory, and a path of a Unix socket holds 107 bytes: keep it short.
_TEMPORARY_PREFIX = "graft-"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocalServer:
    """A server that runs: `metrics` is the directory of its exporter."""

    url: str
    metrics: Path


@contextmanager
def local_server(
    pools: Sequence[ServeSettings], host: str, port: int, progress: Progress, metrics: tuple[str, int] | None = None
) -> Iterator[LocalServer]:
    """Start Ray, Ray Serve and the replicas of all pools; yields the server once every replica is ready. `metrics`:
    host and port that Prometheus can scrape. Everything is stopped and removed at the end. Raises PortInUse,
    EngineStartFailed, or NodeLost if Ray ends while the server runs."""
    check_port(host, port)
    directory = Path(tempfile.mkdtemp(prefix=_TEMPORARY_PREFIX))
    pools = [_with_metrics(settings, directory / "metrics") for settings in pools]
    try:
        _set_environment(environment(directory, pools[0]))
        progress("Ray starts")
        with (
            _exporter(directory / "metrics", metrics),
            _proxy_map(directory, pools[0]),
            _ray(directory, pools) as resources,
        ):
            _require_gpus(resources, pools)
            _deploy(pools, host, port, progress)
            with _pool_controller(pools):
                yield LocalServer(f"http://{host}:{port}", directory / "metrics")
    except EngineStartFailed as error:
        source, logs = directory / "ray" / "session_latest" / "logs", pools[0].state_dir / "failed-start"
        if not source.is_dir():
            raise  # Ray itself was not started
        shutil.rmtree(logs, ignore_errors=True)
        shutil.copytree(source, logs, ignore=_SOCKETS, ignore_dangling_symlinks=True)
        raise EngineStartFailed(f"{error} The logs of Ray and vLLM are in {logs}.") from error
    finally:
        _kill_leftovers(directory)
        shutil.rmtree(directory, ignore_errors=True)


def _set_environment(variables: dict[str, str]) -> None:
    """Set the variables of this process. Raises EngineStartFailed if the installed Ray ignores one of them. Warns of
    other RAY_ variables of this process that Ray ignores."""
    for name in ignored_variables({**os.environ, **variables}):
        if name in variables:
            raise EngineStartFailed(f"The installed Ray reads no variable {name}: Graft needs another version of Ray.")
        logger.warning("Warning: the installed Ray ignores the variable %s.", name)
    os.environ.update(variables)


def _with_metrics(settings: ServeSettings, directory: Path) -> ServeSettings:
    return settings.model_copy(update={"metrics": settings.metrics.model_copy(update={"directory": directory})})


@contextmanager
def _proxy_map(directory: Path, settings: ServeSettings) -> Iterator[None]:
    """The map by which the proxy finds the pool of a request. Raises StoreUnavailable if there is no catalogue."""
    log = StateDir.of_server(settings).log
    proxy_map = ProxyMap(map_of_models(directory), proxy_directory(directory), settings, log)
    proxy_map.update()
    with repeated(proxy_map.update, "the proxy's map of models could not be updated."):
        yield


def _pool_controller(pools: Sequence[ServeSettings]) -> contextlib.AbstractContextManager[None]:
    """Starts and stops pools as the catalogue says."""
    from serve.deployment import ray_patches
    from serve.deployment.app import deploy_config

    def deploy(wanted: Sequence[ServeSettings]) -> None:
        ray_patches.deploy(deploy_config(wanted))

    controller = PoolController(pools, StateDir.of_server(pools[0]).log, deploy)
    return repeated(controller.update, "the pools could not be changed as the catalogue says.")


@contextmanager
def _exporter(directory: Path, address: tuple[str, int] | None) -> Iterator[None]:
    """The exporter of metrics, a process of its own: it outlives Ray. Raises PortInUse."""
    if address is None:
        yield
        return
    host, port = address
    check_port(host, port, "--metrics-port")
    command = [sys.executable, "-m", "serve", "metrics", str(directory)]
    process = subprocess.Popen(  # noqa: S603  (nothing of a user's is run)
        [*command, "--host", host, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def metrics_address(host: str, port: int | None) -> tuple[str, int] | None:
    """Where Prometheus can scrape; None for port 0. A port of None is the default port, or any if that is taken."""
    if port is not None:
        return (host, port) if port else None
    try:
        check_port(host, DEFAULT_PORT)
    except PortInUse:
        return host, free_port()
    return host, DEFAULT_PORT


@contextmanager
def _ray(directory: Path, pools: Sequence[ServeSettings]) -> Iterator[dict[str, float]]:
    """Ray's resources, for as long as it runs."""
    import ray

    from serve.deployment import ray_patches

    on_sigterm = signal.getsignal(signal.SIGTERM)
    reserved = sum(settings.replicas * settings.cpus_per_replica for settings in pools)
    cpus = max(os.cpu_count() or 1, int(reserved) + 1)
    ray_patches.start_ray(directory / "ray", cpus)
    # Ray installs a handler of its own, which ends the process with status 15.
    signal.signal(signal.SIGTERM, on_sigterm)
    shut_down: Callable[[], None] = ray_patches.shut_down
    try:
        ray_patches.end_idle_processes()
        yield ray.cluster_resources()
    except NodeLost:
        shut_down = _kill_children  # no process is left that could shut down in order
        raise
    finally:
        shut_down()


def _kill_children() -> None:
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def wait_while_ray_runs(warn: Callable[[str], None]) -> None:
    """Never returns; a signal ends it. Calls `warn` with one line when memory gets short. Raises NodeLost when a
    process of Ray itself has ended: nothing restarts these processes, and the replicas end with them."""
    processes = [child for child in psutil.Process().children() if child.name() in _RAY_PROCESSES]
    memory_watch = MemoryWatch()
    while all(map(_runs, processes)):
        try:
            if warning := memory_watch.warning(memory_left()):
                warn(warning)
        except Exception:  # a warning that can't be made, or printed, must not end the server
            logger.debug("could not warn of short memory", exc_info=True)
        time.sleep(_NODE_POLL_S)
    raise NodeLost("A process of Ray's own ended, and the replicas with it. Start the server again.")


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:  # it ended between the two questions
        return False


def _require_gpus(resources: dict[str, float], pools: Sequence[ServeSettings]) -> None:
    """Raises EngineStartFailed; Ray Serve would wait for missing GPUs for ever."""
    needed = sum(settings.replicas * settings.gpus_per_replica for settings in pools)
    available = resources.get("GPU", 0)
    if needed > available:
        raise EngineStartFailed(
            f"{pools[0].all_engines} engines with {pools[0].gpus_per_replica:g} GPUs each need {needed:g}, "
            f"this machine has {available:g}."
        )


def _deploy(pools: Sequence[ServeSettings], host: str, port: int, progress: Progress) -> None:
    from ray import serve as ray_serve
    from ray.exceptions import RayError

    from serve.deployment import ray_patches
    from serve.deployment.app import deploy_config

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        ray_serve.start(http_options={"host": host, "port": port}, proxy_location="HeadOnly")
    except RayError as error:
        raise EngineStartFailed(f"The proxy did not start: {' '.join(str(error).split())}") from error
    ray_patches.deploy(deploy_config(pools))
    names = {settings.application: settings.engine.model_name for settings in pools}
    wait_until_running(lambda: ray_serve.status().applications, names, pools[0].all_engines, progress)
    progress("the proxy starts to answer")
    _wait_until_answering(f"http://{host}:{port}/health")


def _wait_until_answering(url: str) -> None:
    """Ray Serve reports RUNNING a moment before HAProxy has loaded the addresses of the replicas."""
    deadline = time.monotonic() + _PROXY_TIMEOUT_S
    with direct_client() as client:
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                if client.get(url).is_success:
                    return
            time.sleep(_POLL_S)
    raise EngineStartFailed(f"The engine runs, but {url} does not answer after {_PROXY_TIMEOUT_S} s.")


def _kill_leftovers(directory: Path) -> None:
    """Kill the processes that name `directory` in their command or environment. An HAProxy that was being replaced
    when Ray Serve stopped stays behind, and so do engines whose replica was killed with its node."""
    own = os.getpid()
    for process in psutil.process_iter(["pid", "cmdline", "environ"]):
        texts = (*(process.info["cmdline"] or ()), *(process.info["environ"] or {}).values())
        if process.pid != own and any(str(directory) in text for text in texts):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
