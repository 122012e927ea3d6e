"""The state of a server: its catalogue and adapter store, which machines may share in an object store, and this
machine's own files: the admin tokens, and the address of the running server."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import psutil
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from convert.artifact.durable_files import replace_file
from serve.catalogue.adapter_store import AdapterStore
from serve.catalogue.log import CatalogueLog
from serve.catalogue.storage.atomic_files import create_file
from serve.catalogue.storage.bucket_store import BucketStore
from serve.catalogue.storage.object_store import DirectoryStore, ObjectStore
from serve.errors import ServerNotRunning, StateInvalid
from serve.settings import LOCAL_ADAPTER_BYTES, ServeSettings
from serve.settings.admin_tokens import read_token, token_digests

_TOKEN = "admin.token"  # noqa: S105  (a file name)
_SERVER = "server.json"
_LOCK = "server.lock"
_DEFAULT_LOCAL = Path("graft-state")


class RunningServer(BaseModel):
    """The content of server.json, by which `publish` finds the server of a state directory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    pid: int
    metrics: str | None = None  # URL for Prometheus
    started: float | None = None  # start time of the process: another process may get the same pid


class StateDir:
    """`place`: a directory with all of the state, or the URL of an object store. With a URL, `local` is the directory
    of this machine's own files, and `local_adapter_bytes` what its copies of adapters may take."""

    def __init__(
        self, place: str | Path, local: Path | None = None, local_adapter_bytes: int = LOCAL_ADAPTER_BYTES
    ) -> None:
        self.url = str(place) if "://" in str(place) else None
        self.root = (local or _DEFAULT_LOCAL if self.url else Path(place)).absolute()
        self._local_adapter_bytes = local_adapter_bytes

    @classmethod
    def of_server(cls, settings: ServeSettings) -> StateDir:
        """That of a server with these settings."""
        place = settings.state_url or settings.state_dir
        return cls(place, settings.state_dir, settings.local_adapter_bytes)

    @property
    def place(self) -> str:
        return self.url or str(self.root)

    @cached_property
    def objects(self) -> ObjectStore:
        """Where catalogue and golden answers are. Raises StateInvalid if the URL is not that of an object store."""
        return BucketStore(self.url) if self.url else DirectoryStore(self.root)

    @cached_property
    def log(self) -> CatalogueLog:
        """One instance, because it remembers what it has read."""
        return CatalogueLog(self.objects)

    @property
    def store(self) -> AdapterStore:
        return AdapterStore(self.root / "adapters", self.objects, self._local_adapter_bytes)

    def publishing_store(self) -> AdapterStore:
        """The store for one who only publishes. If a bucket holds the state it keeps no copy on this machine: nothing
        reads it again, and a follower would fill its disk. Raises StateInvalid."""
        if self.url is None:
            return self.store
        self.prepare()
        return AdapterStore(self.root / "publishing", self.objects, max_bytes=0)

    @property
    def keys_file(self) -> Path:
        return self.root / "keys.json"

    def prepare(self) -> None:
        """Create the directory. Raises StateInvalid if the system refuses."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StateInvalid(f"Can't use {self.root} as state directory: {error.strerror}.") from error

    def admin_token(self) -> str:
        """The token of the admin API. The first call creates it, in a file that only its owner can read. Raises
        StateInvalid if the file holds no usable token."""
        path = self.root / _TOKEN
        if not path.exists():
            create_file(path, secrets.token_urlsafe(32).encode())
        return read_token(path)

    def admin_tokens(self) -> dict[str, str]:
        """The SHA-256 of every admin token by its label: the file LABEL.token in the state directory. There is always
        the token with the label `admin`. Raises StateInvalid if one of the files holds no usable token."""
        self.admin_token()
        return token_digests(self.root)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep every other server off this directory until the block ends, or the process: two servers would mix the
        adapters of two base models in one catalogue. Raises StateInvalid if another server has the directory."""
        lock = FileLock(self.root / _LOCK, timeout=0, fallback_to_soft=False)
        try:
            lock.acquire()
        except Timeout:
            raise StateInvalid(
                f"{self.root} is in use by {self._other_server()}. Stop it, or choose another --state."
            ) from None
        except (OSError, NotImplementedError) as error:
            raise StateInvalid(f"Can't lock {self.root} as state directory: {error}.") from error
        try:
            yield
        finally:
            lock.release()

    def _other_server(self) -> str:
        try:
            server = self.running_server()
        except ServerNotRunning:
            return "another server, which is starting or stopping"
        return f"the server at {server.url} (process {server.pid})"

    def announce(self, url: str, metrics: str | None = None) -> None:
        """Record this process, which has claimed the directory, as its server; `metrics`: the URL for Prometheus."""
        pid = os.getpid()
        server = RunningServer(url=url, pid=pid, started=_start_time(pid), metrics=metrics)
        replace_file(self.root / _SERVER, server.model_dump_json().encode())

    def withdraw(self) -> None:
        """Undo `announce`."""
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


def _is_alive(server: RunningServer) -> bool:
    started = _start_time(server.pid)
    return started is not None and server.started in (None, started)


def _start_time(pid: int) -> float | None:
    """Seconds since the epoch; None if there is no such process."""
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return None
