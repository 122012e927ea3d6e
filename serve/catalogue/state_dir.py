"""The state of a server: catalogue and adapter store, which an object store may share between machines, and this
machine's own part: the admin's tokens, and where the server listens."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from functools import cached_property
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from serve.bucket import Bucket
from serve.errors import ServerNotRunning, StateInvalid
from serve.log import CatalogueLog
from serve.objects import Directory, Objects
from serve.store import AdapterStore

_TOKEN = "admin.token"  # noqa: S105  (a file name)
_SERVER = "server.json"
_DEFAULT_LOCAL = Path("graft-state")


class RunningServer(BaseModel):
    """What `publish` needs to find the server of a state directory; `metrics` is where Prometheus may scrape."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    pid: int
    metrics: str | None = None
    started: float | None = None  # of that process: in a new container another may soon have its number


class StateDir:
    """`place`: a directory, which is all of the state, or the URL of an object store. Then `local` is the directory
    that holds what is this machine's."""

    def __init__(self, place: str | Path, local: Path | None = None) -> None:
        self.url = str(place) if "://" in str(place) else None
        self.root = (local or _DEFAULT_LOCAL if self.url else Path(place)).absolute()

    @property
    def place(self) -> str:
        return self.url or str(self.root)

    @cached_property
    def objects(self) -> Objects:
        """Raises StateInvalid if the URL is none of a known object store."""
        return Bucket(self.url) if self.url else Directory(self.root)

    @property
    def log(self) -> CatalogueLog:
        return CatalogueLog(self.objects)

    @property
    def store(self) -> AdapterStore:
        return AdapterStore(self.root / "adapters", self.objects)

    @property
    def keys_file(self) -> Path:
        return self.root / "keys.json"

    def prepare(self) -> None:
        """Make the directory. Raises StateInvalid if that can't be."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StateInvalid(f"Can't use {self.root} as state directory: {error.strerror}.") from error

    def admin_token(self) -> str:
        """The token of the admin API: made once, readable by its owner only."""
        path = self.root / _TOKEN
        if not path.exists():
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as stream:
                stream.write(secrets.token_urlsafe(32))
        return path.read_text().strip()

    def admin_tokens(self) -> dict[str, str]:
        """SHA-256 of every token by its label: LABEL.token in the state directory. One is always there."""
        self.admin_token()
        return {path.stem: sha256(path.read_text().strip()) for path in sorted(self.root.glob("*.token"))}

    def require_unused(self) -> None:
        """Raises StateInvalid if a server runs on this directory: two would write one catalogue for two bases."""
        with contextlib.suppress(ServerNotRunning):
            server = self.running_server()
            raise StateInvalid(
                f"{self.root} is in use by the server at {server.url} (process {server.pid}). Stop it, choose another "
                f"--state, or remove {self.root / _SERVER} if that process is something else."
            )

    def announce(self, url: str, metrics: str | None = None) -> None:
        pid = os.getpid()
        server = RunningServer(url=url, pid=pid, started=_start_of(pid), metrics=metrics)
        (self.root / _SERVER).write_text(server.model_dump_json())

    def withdraw(self) -> None:
        (self.root / _SERVER).unlink(missing_ok=True)

    def running_server(self) -> RunningServer:
        """Raises ServerNotRunning if no server uses this directory now."""
        try:
            server = RunningServer.model_validate_json((self.root / _SERVER).read_bytes())
        except (OSError, ValidationError) as error:
            raise ServerNotRunning(
                f"No server runs on the state directory {self.root}. "
                "Start one with: python -m serve run ARTIFACT --state DIR"
            ) from error
        if not _is_alive(server):
            raise ServerNotRunning(f"The server of {self.root} (process {server.pid}) is gone; start it again.")
        return server


def sha256(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _is_alive(server: RunningServer) -> bool:
    started = _start_of(server.pid)
    return started is not None and server.started in (None, started)


def _start_of(pid: int) -> float | None:
    """Seconds since the epoch; None if there is no such process."""
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return None
