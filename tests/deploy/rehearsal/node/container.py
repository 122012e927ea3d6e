"""One container: a process with the root, the user, the rights, the network and the files that its pod says.

Not enforced, because it takes what isn't here: limits of memory and CPU, seccomp, the size of a claim, network
policies.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.deploy.manifests import ROOT, Document
from tests.deploy.rehearsal.images import Image
from tests.deploy.rehearsal.node.variables import expanded_all
from tests.deploy.rehearsal.node.volumes import Volumes

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Surroundings:
    """What all containers of a pod share. `files` holds what `machine_files` wrote."""

    namespace: str
    files: Path
    home: Path
    volumes: Volumes
    security: Document


def machine_files(directory: Path) -> None:
    """What an image has and this machine may not: tini, the user, and names that are looked up in the cluster only."""
    (directory / "bin").mkdir(parents=True)
    (directory / "bin" / "tini").write_text((_HERE / "tini.sh").read_text())
    (directory / "bin" / "tini").chmod(0o755)
    shutil.copy(_HERE.parent / "engineless.py", directory / "bin")
    (directory / "passwd").write_text("root:x:0:0::/root:/bin/sh\ngraft:x:10001:10001::/tmp:/usr/sbin/nologin\n")
    (directory / "group").write_text("root:x:0:\ngraft:x:10001:\n")
    (directory / "resolv.conf").write_text("")


class Container:
    """Started when it is made; `log` is what it writes."""

    def __init__(self, spec: Document, image: Image, variables: dict[str, str], pod: Surroundings, log: Path) -> None:
        self.name: str = spec["name"]
        self._pod = pod
        self._own = pod.security | spec.get("securityContext", {})
        self._environment = {
            "HOSTNAME": pod.home.name,
            **image.environment,
            "PYTHONPATH": "/opt/graft-source",
            **variables,
        }
        command = [
            *expanded_all(spec.get("command") or image.entrypoint, variables),
            *expanded_all(spec.get("args") or (() if spec.get("command") else image.command), variables),
        ]
        root = pod.home / "roots" / self.name
        root.mkdir(parents=True, exist_ok=True)
        settings = {
            **self._identity(image),
            "RH_ROOT": str(root),
            "RH_NAME": pod.home.name,
            "RH_FILES": str(pod.files),
            "RH_ENVIRONMENT": sys.prefix,
            "RH_PYTHON": sys.base_prefix,
            "RH_SOURCE": str(ROOT),
            "RH_DIRECTORY": spec.get("workingDir", image.directory),
            "RH_READ_ONLY": "yes" if self._own.get("readOnlyRootFilesystem") else "no",
            "RH_MOUNTS": "\n".join(self._mount(mount) for mount in spec.get("volumeMounts", [])),
        }
        self._identity_options = settings
        enter = [
            *("setpriv", "--pdeathsig", "KILL"),
            "nsenter",
            f"--net=/run/netns/{pod.namespace}",
            "unshare",
            "--mount",
            "--pid",
            "--fork",
        ]
        reading, writing = os.pipe()
        with log.open("ab") as output, _in_memory(self._environment) as handed:
            # As runtimes do: the process may open its own output again.
            os.fchown(output.fileno(), int(settings["RH_USER"]), -1)
            numbers = {"RH_VARIABLES": str(handed.fileno()), "RH_STARTED": str(writing)}
            self._process = subprocess.Popen(
                [*enter, "--ipc", "--uts", "bash", str(_HERE / "root.sh"), *command],
                env={"PATH": os.environ["PATH"], **settings, **numbers},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[handed.fileno(), writing],
            )
        os.close(writing)
        os.read(reading, 1)  # until its root is made, or couldn't be: then the log says why
        os.close(reading)

    def poll(self) -> int | None:
        return self._process.poll()

    def run(self, command: list[str], data: bytes = b"", timeout_s: float = 60) -> subprocess.CompletedProcess[bytes]:
        """`kubectl exec`: another process in the container, as its user."""
        enter = ["nsenter", "--target", str(self._first_process()), "--mount", "--pid", "--net", "--ipc", "--uts"]
        identity = self._identity_options
        become = [
            *("setpriv", "--reuid", identity["RH_USER"], "--regid", identity["RH_GROUP"]),
            *("--groups", identity["RH_GROUPS"], "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "--"),
        ]
        variables = [
            "env",
            "--chdir=/",
            "--ignore-environment",
            *(f"{key}={value}" for key, value in self._environment.items()),
        ]
        return subprocess.run(
            [*enter, *become, *variables, *command], input=data, capture_output=True, check=False, timeout=timeout_s
        )

    def stop(self, grace_s: float) -> None:
        """SIGTERM, and SIGKILL to all of it after `grace_s`."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError, IndexError, FileNotFoundError):  # it just ended
                os.kill(self._first_process(), signal.SIGTERM)
            try:
                self._process.wait(grace_s)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """With its first process the system ends all others of a container."""
        with contextlib.suppress(ProcessLookupError, IndexError, FileNotFoundError):
            os.kill(self._first_process(), signal.SIGKILL)
        self._process.kill()
        self._process.wait()

    def _first_process(self) -> int:
        """Process 1 of the container, by the number that it has outside."""
        pid = self._process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def _identity(self, image: Image) -> dict[str, str]:
        user, _, group = image.user.partition(":")
        user, group = str(self._own.get("runAsUser", user)), str(self._own.get("runAsGroup", group or "0"))
        groups = [group, *([str(self._own["fsGroup"])] if "fsGroup" in self._own else [])]
        return {"RH_USER": user, "RH_GROUP": group, "RH_GROUPS": ",".join(dict.fromkeys(groups))}

    def _mount(self, mount: Document) -> str:
        volumes, name = self._pod.volumes, mount["name"]
        if (size := volumes.size_of_memory(name)) is not None:
            return f"memory|{mount['mountPath']}|{size}"
        source = volumes.path(name) / mount.get("subPath", "")
        read_only = mount.get("readOnly") or volumes.is_read_only(name)
        return f"{source.resolve()}|{mount['mountPath']}|{'ro' if read_only else ''}"


def _in_memory(environment: dict[str, str]) -> Any:
    """A file without a name, so that no list of processes shows what a Secret holds."""
    file = os.fdopen(os.memfd_create("variables"), "w+b")
    file.write(b"".join(f"{key}={value}\0".encode() for key, value in environment.items()))
    file.seek(0)
    return file
