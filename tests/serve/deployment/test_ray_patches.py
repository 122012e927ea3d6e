"""Ray Serve's gRPC port of a replica, with Ray Serve's own function and a real server."""

from __future__ import annotations

import grpc
import psutil
import pytest
from ray.serve._private import replica as serve_replica

from serve.deployment.ray_patches import keep_replica_on


@pytest.mark.parametrize(("node", "addresses"), [("127.0.0.1", {"127.0.0.1"}), ("10.0.0.7", {"::"})])
async def test_a_replica_listens_for_ray_serve_where_its_node_is(
    monkeypatch: pytest.MonkeyPatch, node: str, addresses: set[str]
) -> None:
    """Other nodes of a cluster must reach it; nobody else than its own machine reaches one of a local server."""
    monkeypatch.setattr(serve_replica, "add_port_to_grpc_server", serve_replica.add_port_to_grpc_server)
    server = grpc.aio.server()

    keep_replica_on(node)
    port = serve_replica.add_port_to_grpc_server(server, "[::]:0")
    await server.start()
    listening = [connection.laddr for connection in psutil.Process().net_connections("inet")]
    await server.stop(None)

    assert port > 0
    assert {at.ip.removeprefix("::ffff:") for at in listening if at.port == port} == addresses
