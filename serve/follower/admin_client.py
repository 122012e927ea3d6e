"""A client of the admin API, for the command line and for `adapters.yaml`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from convert.artifact import Artifact
from serve.adapters.ingest import ingest_artifact
from serve.catalogue.entry import CALLER_HEADER, user_name
from serve.catalogue.split import Kind
from serve.catalogue.state_dir import StateDir
from serve.errors import AdminRefused, PoolRefused, ServerNotRunning
from serve.settings import NO_POOL_OPTIONS, PoolOptions

TOKEN_VARIABLE = "GRAFT_ADMIN_TOKEN"  # noqa: S105  (the name of a variable)
_TIMEOUT_S = 300  # a publish waits for every replica
_POOL_TIMEOUT_S = 1800  # a large model is read from a slow disk, three times at most
_POOL_POLL_S = 0.5


@dataclass(frozen=True)
class AdminClient:
    """Calls one server, whose state directory or bucket is `state`. Every call raises AdminRefused with the error that
    the server answered, or ServerNotRunning."""

    state: StateDir
    url: str
    token: str

    @classmethod
    def of(cls, state: StateDir, url: str | None = None) -> AdminClient:
        """The server of a state directory, or the one at `url`. Raises ServerNotRunning if there is none."""
        server_url = url.rstrip("/") if url else state.running_server().url
        return cls(state, server_url, os.environ.get(TOKEN_VARIABLE) or state.admin_token())

    def publish(
        self, path: Path, name: str | None = None, *, stage_only: bool = False, reason: str = ""
    ) -> dict[str, Any]:
        """Puts the adapter of an artifact into the store and has it published, or only staged. Raises ArtifactInvalid
        or ArtifactRefused before anything is sent."""
        artifact = Artifact.open(path)
        artifact.verify()
        candidate = ingest_artifact(artifact, name, self.state.publishing_store())
        body = {"candidate": asdict(candidate), "stage_only": stage_only, "reason": reason}
        return self.call("POST", "/admin/v1/adapters", body)

    def adapters(self) -> list[dict[str, Any]]:
        adapters: list[dict[str, Any]] = self.call("GET", "/admin/v1/adapters")["adapters"]
        return adapters

    def show(self, name: str) -> dict[str, Any]:
        return self.call("GET", _path_of(name))

    def change(self, verb: str, name: str, revision: str | None, reason: str = "") -> dict[str, Any]:
        """promote, rollback, pin, unpin or abandon."""
        return self.call("POST", f"{_path_of(name)}/{verb}", {"revision": revision, "reason": reason})

    def roll_back(self, name: str, revision: str | None, reason: str = "") -> dict[str, Any]:
        """Looks up the revision before the call, so that a proxy that repeats the call does not roll back twice."""
        if revision is None:
            shown = self.show(name)
            target = shown["current"] if shown["pool"] else shown["previous"]
            revision = target.partition("@")[2] if target else None
        return self.change("rollback", name, revision, reason)

    def begin_split(self, kind: Kind, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """Begins a canary or shadow; `body` holds the revision, its policy and the reason."""
        return self.call("POST", f"{_path_of(name)}/{kind}", body)

    def end_split(self, kind: Kind, name: str, reason: str = "") -> dict[str, Any]:
        query = f"?reason={quote(reason, safe='')}" if reason else ""
        return self.call("DELETE", f"{_path_of(name)}/{kind}{query}")

    def retire(self, name: str, reason: str = "") -> dict[str, Any]:
        return self.call("DELETE", f"{_path_of(name)}?reason={quote(reason, safe='')}")

    def history(self, name: str | None, limit: int) -> list[dict[str, Any]]:
        path = f"{_path_of(name)}/history" if name else "/admin/v1/history"
        entries: list[dict[str, Any]] = self.call("GET", f"{path}?limit={limit}")["history"]
        return entries

    def replicas(self) -> list[dict[str, Any]]:
        reports: list[dict[str, Any]] = self.call("GET", "/admin/v1/replicas")["replicas"]
        return reports

    def pools(self) -> list[dict[str, Any]]:
        pools: list[dict[str, Any]] = self.call("GET", "/admin/v1/pools")["pools"]
        return pools

    def add_pool(
        self,
        artifact: Path,
        name: str | None,
        replicas: int,
        max_lora_rank: int | None,
        reason: str = "",
        options: PoolOptions = NO_POOL_OPTIONS,
    ) -> dict[str, Any]:
        """Returns while its engines start. `artifact`: on the server's machine."""
        fields = {"name": name, "replicas": replicas, "max_lora_rank": max_lora_rank, "reason": reason}
        fields |= options.model_dump(mode="json", exclude_defaults=True)
        return self.call("POST", "/admin/v1/pools", {"path": str(artifact.absolute()), **fields})

    def move(self, name: str, pool: str, reason: str = "") -> dict[str, Any]:
        return self.call("POST", f"{_path_of(name)}/move", {"pool": pool, "reason": reason})

    def wait_for_pool(self, name: str, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
        """Returns when the engines of a pool that was added answer. Raises PoolRefused with the reason if they don't
        start, and after half an hour."""
        deadline = time.monotonic() + _POOL_TIMEOUT_S
        while True:
            pool = next((pool for pool in self.pools() if pool["name"] == name), None)
            if pool is None:
                raise PoolRefused(f"{name} was removed before it was ready.")
            if pool["state"] in ("running", "asleep"):
                return pool
            if pool["state"] == "failed" or time.monotonic() > deadline:
                reason = pool["reason"] or f"It is not ready after {_POOL_TIMEOUT_S} s."
                remedy = f"Take the pool away with: python -m serve pool remove {name}"
                raise PoolRefused(f"The engine of {name} did not start: {reason} {remedy}")
            progress(f"{pool['ready']} of {pool['replicas']} engines are ready")
            time.sleep(_POOL_POLL_S)

    def remove_pool(self, name: str, reason: str = "") -> dict[str, Any]:
        return self.call("DELETE", f"/admin/v1/pools/{quote(name, safe='')}?reason={quote(reason, safe='')}")

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        import httpx  # both are imported here because that takes time, which `--help` need not wait

        from serve.follower.http_client import direct_client

        headers = {"authorization": f"Bearer {self.token}", CALLER_HEADER: user_name()}
        try:
            with direct_client(headers=headers, timeout=_TIMEOUT_S) as client:
                response = client.request(method, self.url + path, json=body)
            answer: dict[str, Any] = response.json()
        except (httpx.HTTPError, ValueError) as error:
            raise ServerNotRunning(f"The server at {self.url} gave no usable answer: {error!r}") from error
        if response.is_error:
            raise AdminRefused(answer["error"]["code"], answer["error"]["message"])
        return answer


def _path_of(name: str) -> str:
    return f"/admin/v1/adapters/{quote(name, safe='')}"
