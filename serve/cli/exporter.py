"""`python -m serve metrics`: one scrape for all replicas of a machine."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from serve.cli.console import print_line, reported_errors
from serve.observability.exporter import DEFAULT_PORT, Exporter, listen


def add_to(app: typer.Typer) -> None:
    """Make `metrics` a command of `app`."""
    app.command(name="metrics")(metrics)


def metrics(
    directory: Annotated[Path, typer.Argument(help="Where the replicas of this machine have their sockets.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = DEFAULT_PORT,
    certificate: Annotated[
        list[Path] | None,
        typer.Option(help="A PEM file whose expiry is exported too, so that an alert can precede it. Repeatable."),
    ] = None,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="A replica that takes longer is reported as down.")] = 2.0,
) -> None:
    """Offer Prometheus the metrics of all replicas of this machine, in one scrape at /metrics.

    A process of its own, which outlives replicas and Ray. `run` starts one by itself; in Kubernetes it is a sidecar
    that shares the directory of `metrics.directory`.
    """
    with reported_errors():
        server = listen(Exporter(directory, tuple(certificate or ()), timeout_s), host, port)
    print_line(f"Metrics of {directory} at http://{host}:{port}/metrics")
    server.serve_forever()


@contextlib.contextmanager
def exporter_of_own(host: str, port: int) -> Iterator[Path | None]:
    """An exporter in this process; yields its directory, or None for port 0. Raises PortInUse."""
    if not port:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="graft-") as directory:
        server = listen(Exporter(Path(directory)), host, port)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield Path(directory)
        finally:
            server.shutdown()
            server.server_close()
