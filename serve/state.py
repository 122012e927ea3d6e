"""The state directory of a server: catalogue, adapter store, admin token, and where the server listens."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from serve.errors import ServerNotRunning, StateInvalid

_TOKEN = "admin.token"  # noqa: S105  (a file name)
_SERVER = "server.json"


class RunningServer(BaseModel):
    """What `publish` needs to find the server of a state directory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    pid: int


class StateDir:
    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    @property
    def catalogue(self) -> Path:
        return self.root / "catalogue"

    @property
    def adapters(self) -> Path:
        return self.root / "adapters"

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

    def require_unused(self) -> None:
        """Raises StateInvalid if a server runs on this directory: two would write one catalogue for two bases."""
        with contextlib.suppress(ServerNotRunning):
            server = self.running_server()
            raise StateInvalid(
                f"{self.root} is in use by the server at {server.url} (process {server.pid}). Stop it, choose another "
                f"--state, or remove {self.root / _SERVER} if that process is something else."
            )

    def announce(self, url: str) -> None:
        (self.root / _SERVER).write_text(RunningServer(url=url, pid=os.getpid()).model_dump_json())

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
        if not _is_alive(server.pid):
            raise ServerNotRunning(f"The server of {self.root} (process {server.pid}) is gone; start it again.")
        return server


def sha256(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
