"""Undocumented parts of Ray that Graft uses or undoes. Each function raises EngineStartFailed where this version of Ray
lacks that part. Ray's environment variables are in `ray_environment`."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import serve as ray_serve
from ray._common.tls_utils import add_port_to_grpc_server
from ray.serve import context as serve_context
from ray.serve._private import replica as serve_replica
from ray.serve.schema import ServeDeploySchema

from serve.errors import EngineStartFailed

# Small, because requests and responses never pass through the object store.
_OBJECT_STORE_BYTES = 100 << 20
# Ray starts them whatever its options say: log_monitor.py forwards logs to a driver that wants none, dashboard.py
# serves no pages, and monitor.py would ask a cloud for nodes, and serves metrics to whoever asks.
IDLE_PROCESSES = ("/log_monitor.py", "/dashboard.py", "/monitor.py")
_LOOPBACK = "127.0.0.1"


def start_ray(directory: Path, cpus: int) -> None:
    """A private Ray in this process, on loopback only, with its files below `directory`. Raises EngineStartFailed if it
    does not start, as on a machine that is too busy, or uses another address."""
    try:
        ray.init(
            address="local",  # not the cluster that someone else may run on this machine
            num_cpus=cpus,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            logging_level="CRITICAL",
            log_to_driver=False,
            _node_ip_address=_LOOPBACK,
            _temp_dir=str(directory),
        )
    except Exception as error:  # Ray raises no class of its own
        raise EngineStartFailed(f"Ray did not start: {' '.join(str(error).split())}") from error
    if (address := node_address()) != _LOOPBACK:
        raise _changed(f"listens on {address} instead of {_LOOPBACK}")


def node_address() -> str:
    """The address at which the other nodes reach this one: the one that Ray was started with. ray.util's function gives
    the address of the machine's route to the internet, which can be another one."""
    own = ray.get_runtime_context().get_node_id()
    return next(str(node["NodeManagerAddress"]) for node in ray.nodes() if node["NodeID"] == own)


def keep_replica_on(address: str) -> None:
    """Has the replica of this process that starts next listen for calls of other deployments on loopback only, if
    `address`, which is its node's, is that: Ray Serve listens on every interface. Raises EngineStartFailed."""
    if not hasattr(serve_replica, "add_port_to_grpc_server"):
        raise _changed("has no ray.serve._private.replica.add_port_to_grpc_server")
    if address == _LOOPBACK:
        serve_replica.add_port_to_grpc_server = _add_loopback_port


def _add_loopback_port(server: Any, address: str) -> int:
    port: int = add_port_to_grpc_server(server, f"{_LOOPBACK}:{address.rpartition(':')[2]}")
    return port


def end_idle_processes() -> None:
    """End the processes of Ray that do nothing for this server. Raises EngineStartFailed if one is not there."""
    children = [(process, _command(process)) for process in psutil.Process().children()]
    for script in IDLE_PROCESSES:
        running = [process for process, command in children if any(word.endswith(script) for word in command)]
        if not running:
            raise _changed(f"starts no process {script}")
        for process in running:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
                process.wait()


def deploy(config: Mapping[str, Any]) -> None:
    """Start or update applications from Ray Serve's declarative configuration: `serve.run` would restart every replica.
    Raises EngineStartFailed."""
    client_of = getattr(serve_context, "_get_global_client", None)
    client: Any = client_of() if client_of else None
    if not hasattr(client, "deploy_apps"):
        raise _changed("has no ray.serve.context._get_global_client().deploy_apps")
    client.deploy_apps(ServeDeploySchema.model_validate(config))


def shut_down() -> None:
    """Stop all applications, Ray Serve and Ray, in this order: running requests finish, and their responses pass
    through the proxy."""
    # Ray prints the intended end of its controller as a failed task, to standard output.
    with contextlib.redirect_stdout(io.StringIO()):
        with contextlib.suppress(Exception):
            applications = list(ray_serve.status().applications)
            for name in applications:
                ray_serve.delete(name, _blocking=False)  # all of them finish their requests at the same time
            for name in applications:
                ray_serve.delete(name)
        ray_serve.shutdown()
        ray.shutdown()


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.NoSuchProcess:
        return []


def _changed(difference: str) -> EngineStartFailed:
    return EngineStartFailed(f"Ray {ray.__version__} {difference}, which serve.deployment.ray_patches is written for.")
