"""What `kubectl`, `docker` and `kind` are on the laptop: each call is handed to the rehearsal, which answers it.

Stands alone: it is run as a program, with the socket of the rehearsal as its first argument.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path


def connected(path: str, request: dict[str, object]) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    connection.sendall(json.dumps(request).encode() + b"\n")
    return connection


def pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)


def forward(path: str, arguments: list[str]) -> None:
    """`kubectl port-forward`: listens until it is killed."""
    place = arguments.index("port-forward")
    target, (port, _, _) = arguments[place + 1], arguments[place + 2].partition(":")
    listener = socket.create_server(("127.0.0.1", int(port)))
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    print(f"Forwarding from 127.0.0.1:{port}", flush=True)
    while True:
        accepted, _ = listener.accept()
        remote = connected(path, {"forward": target})
        for pair in ((accepted, remote), (remote, accepted)):
            threading.Thread(target=pump, args=pair, daemon=True).start()


def main() -> int:
    path, program, *arguments = sys.argv[1:]
    if "port-forward" in arguments:
        forward(path, arguments)
    data = sys.stdin.read() if "-" in arguments else ""
    request = {"program": program, "arguments": arguments, "directory": str(Path.cwd()), "data": data}
    with connected(path, request) as connection:
        reply = json.loads(connection.makefile().read())
    sys.stdout.write(reply["output"])
    sys.stderr.write(reply["error"])
    return 1 if reply["error"] else 0


if __name__ == "__main__":
    sys.exit(main())
