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

from tests.deploy.manifests import ROOT
from tests.deploy.rehearsal import kubectl
from tests.deploy.rehearsal.controllers import Cluster
from tests.deploy.rehearsal.images import images, without_engine
from tests.deploy.rehearsal.node.network import join
from tests.deploy.rehearsal.objects import Refused
from tests.deploy.rehearsal.programs import PROGRAMS, Programs

_FAILED, _DONE = "@@failed:", "@@done"
_TICK_S = 0.05


class Laptop:
    """`directory` is where its shell is, and where the reader's own files go. `close` ends the shell."""

    def __init__(self, cluster: Cluster, home: Path, *, engine: bool = True) -> None:
        """Without an engine, what runs as the server only says that it was reached."""
        self.directory = home / "graft"
        self._cluster = cluster
        self._programs = Programs(cluster, home / "docker", images() if engine else without_engine())
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

    def type(self, code: str, timeout_s: float = 600, *, fails: bool = False) -> str:
        """What the commands print. Raises AssertionError with all of it if one fails, or with `fails` if none does."""
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
        assert (_FAILED in output) == fails, f"{code}\n{output}\n{self._state()}"
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
        (home / "bin" / "sudo").write_text('#!/bin/sh\nexec "$@"\n')
        (home / "bin" / "sudo").chmod(0o755)
        for program in PROGRAMS:
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
            reply["output"] = self._programs.answer(
                request["program"], request["arguments"], Path(request["directory"]), request["data"]
            )
        except Refused as error:
            reply["error"] = f"Error from server: {error}\n"
        except Exception as error:  # whatever it is, the reader's shell must not wait for ever
            reply["error"] = f"the rehearsal can't do this: {error!r}\n"
        with connection:
            connection.sendall(json.dumps(reply).encode())
        return None

    def _forward(self, connection: socket.socket, name: str) -> None:
        with contextlib.suppress(OSError):
            service = self._cluster.objects.find(*kubectl.target(name))
            endpoint = self._cluster.endpoint(service, only_ready=False) if service else None
            if endpoint is not None:
                join(connection, socket.create_connection(endpoint, timeout=600))
        connection.close()
