"""The stranger's machine: a shell in a copy of the repository that reaches the cluster through kubectl only."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tests.deploy.manifests import ROOT
from tests.deploy.rehearsal import kubectl
from tests.deploy.rehearsal.controllers import Cluster
from tests.deploy.rehearsal.images import images
from tests.deploy.rehearsal.network import join
from tests.deploy.rehearsal.objects import Refused

_FAILED, _DONE = "@@failed:", "@@done"
_TICK_S = 0.05


class Laptop:
    """`directory` is where its shell is, and where the reader's own files go. `close` ends the shell."""

    def __init__(self, cluster: Cluster, home: Path) -> None:
        self.directory = home / "graft"
        self._cluster = cluster
        self._built: dict[str, str] = {}  # targets of the Dockerfile by the name of the image
        self._prepare(home)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(home / "api"))
        self._socket.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()
        self._screen = home / "screen"
        namespace = cluster.network.add_isolated()
        environment = {"HOME": str(home), "PATH": f"{home / 'bin'}:{os.environ['PATH']}", "LANG": "C.UTF-8"}
        with self._screen.open("wb") as screen:
            self._shell = subprocess.Popen(
                [
                    "setpriv",
                    "--pdeathsig",
                    "KILL",
                    "nsenter",
                    f"--net=/run/netns/{namespace}",
                    "bash",
                    "--noprofile",
                    "--norc",
                ],
                cwd=self.directory,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=screen,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        self._seen = 0
        self.type(f"trap 'echo \"{_FAILED} $BASH_COMMAND\"' ERR\n")

    def type(self, code: str, timeout_s: float = 600) -> str:
        """What the commands print. Raises AssertionError with all of it if one fails."""
        assert self._shell.stdin is not None
        self._shell.stdin.write(f"{code}\necho {_DONE}\n")
        self._shell.stdin.flush()
        deadline = time.monotonic() + timeout_s
        while _DONE not in (output := self._unseen()):
            assert self._shell.poll() is None, output
            assert time.monotonic() < deadline, f"{code}\n{output}\n{self._state()}"
            time.sleep(_TICK_S)
        if code.rstrip().endswith("&"):  # a reader sees that it listens before typing on
            while "Forwarding from" not in (output := self._unseen()):
                assert time.monotonic() < deadline, output
                time.sleep(_TICK_S)
        self._seen += len(output)
        assert _FAILED not in output, f"{code}\n{output}\n{self._state()}"
        return output.replace(_DONE, "").strip()

    def close(self) -> None:
        self._shell.kill()
        self._shell.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._shell.pid, 9)
        self._socket.close()

    def _unseen(self) -> str:
        return self._screen.read_text(errors="replace")[self._seen :]

    def _state(self) -> str:
        return kubectl.described(self._cluster)

    def _prepare(self, home: Path) -> None:
        self.directory.mkdir(parents=True)
        shutil.copytree(ROOT / "deploy", self.directory / "deploy")
        shutil.copy(ROOT / "Dockerfile", self.directory)
        (self.directory / ".venv").symlink_to(sys.prefix)
        for name in ("convert", "serve"):
            (self.directory / name).symlink_to(ROOT / name)
        (home / "bin").mkdir()
        for program in ("docker", "kind", "kubectl"):
            path = home / "bin" / program
            command = shlex.join([sys.executable, "-I", str(Path(__file__).with_name("program.py")), str(home / "api")])
            path.write_text(f'#!/bin/sh\nexec {command} {program} "$@"\n')
            path.chmod(0o755)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        line = bytearray()
        while not line.endswith(b"\n"):
            line += connection.recv(1)
        request = json.loads(line)
        if "forward" in request:
            return self._forward(connection, request["forward"])
        reply = {"output": "", "error": ""}
        try:
            reply["output"] = self._run(request)
        except Refused as error:
            reply["error"] = f"Error from server: {error}\n"
        except Exception as error:  # whatever it is, the reader's shell must not wait for ever
            reply["error"] = f"the rehearsal can't do this: {error!r}\n"
        with connection:
            connection.sendall(json.dumps(reply).encode())
        return None

    def _run(self, request: dict[str, Any]) -> str:
        arguments = request["arguments"]
        match request["program"], arguments:
            case "docker", ["build", "--target", stage, "-t", name, "."] if stage in images():
                self._built[name] = stage
                return ""
            case "kind", ["load", "docker-image", *names] if set(names) <= self._built.keys():
                self._cluster.node.images.update({name: images()[self._built[name]] for name in names})
                return ""
            case "kubectl", _:
                return kubectl.answer(self._cluster, arguments, Path(request["directory"]), request["data"])
        raise Refused(f"this rehearsal has no {request['program']} {' '.join(arguments)}")

    def _forward(self, connection: socket.socket, name: str) -> None:
        with contextlib.suppress(OSError):
            service = self._cluster.objects.find(*kubectl.target(name))
            endpoint = self._cluster.endpoint(service, only_ready=False) if service else None
            if endpoint is not None:
                join(connection, socket.create_connection(endpoint, timeout=600))
        connection.close()
