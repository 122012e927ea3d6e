#!/opt/graft/bin/python
"""`drain-node SECONDS`: move what runs on this Ray node away before its pod ends (preStop).

Ray stops giving the node work, and Serve starts replacements where there is room. Replicas here finish what they run
and stop, at the latest when the time is over. Returns once none is left. If Ray can't be asked any more there is
nothing to move: that is no error.
"""

import sys
import time

import psutil
from ray._raylet import GcsClient
from ray.core.generated import autoscaler_pb2

_POLL_S = 0.5


def own_raylet() -> tuple[psutil.Process, dict[str, str]] | None:
    """The process of this machine's Ray node, and its arguments."""
    addresses = {address.address for interface in psutil.net_if_addrs().values() for address in interface}
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] == "raylet":
            arguments = dict(argument.split("=", 1) for argument in process.info["cmdline"] if "=" in argument)
            if arguments.get("--node_ip_address") in addresses:
                return process, arguments
    return None


def drain(arguments: dict[str, str], seconds: float) -> None:
    """Raises RuntimeError if Ray does not take it."""
    client = GcsClient(address=arguments["--gcs-address"])
    reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION  # the one that can't be refused
    deadline_ms = int((time.time() + seconds) * 1000)
    accepted, why_not = client.drain_node(arguments["--node_id"], reason, "its pod is ending", deadline_ms)
    if not accepted:
        raise RuntimeError(why_not)


def replicas(raylet: psutil.Process) -> int:
    names = []
    for process in raylet.children(recursive=True):
        try:
            names.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return sum("ServeReplica" in name for name in names)


def main(seconds: float) -> None:
    until = time.monotonic() + seconds
    node = own_raylet()
    if node is None:
        return
    raylet, arguments = node
    drain(arguments, seconds)
    while time.monotonic() < until and replicas(raylet):
        time.sleep(_POLL_S)


if __name__ == "__main__":
    main(float(sys.argv[1]))
