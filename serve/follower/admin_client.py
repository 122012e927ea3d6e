"""The admin API as the command line calls it."""

from __future__ import annotations

import getpass
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from convert.artifact import Artifact
from serve.entry import CALLER_HEADER
from serve.errors import AdminRefused, ServerNotRunning
from serve.intake import take_artifact
from serve.split import Kind
from serve.state import StateDir

TOKEN_VARIABLE = "GRAFT_ADMIN_TOKEN"  # noqa: S105  (the name of a variable)
_TIMEOUT_S = 300  # a publish waits for every replica


@dataclass(frozen=True)
class AdminClient:
    """One server and the state that it serves from. Every call raises AdminRefused with what the server answered, or
    ServerNotRunning."""

    state: StateDir
    url: str
    token: str

    @classmethod
    def of(cls, state: StateDir, url: str | None = None) -> AdminClient:
        """The server of a state directory, or the one at `url`. Raises ServerNotRunning if there is none."""
        found = url.rstrip("/") if url else state.running_server().url
        return cls(state, found, os.environ.get(TOKEN_VARIABLE) or state.admin_token())

    def publish(
        self, path: Path, name: str | None = None, *, stage_only: bool = False, reason: str = ""
    ) -> dict[str, Any]:
        """Send an artifact's adapter into the store and have it published, or only staged. Raises ArtifactInvalid or
        ArtifactRefused before anything is sent."""
        artifact = Artifact.open(path)
        artifact.verify()
        candidate = take_artifact(artifact, name, self.state.store)
        body = {"candidate": asdict(candidate), "stage_only": stage_only, "reason": reason}
        return self.call("POST", "/admin/v1/adapters", body)

    def adapters(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.call("GET", "/admin/v1/adapters")["adapters"]
        return found

    def show(self, name: str) -> dict[str, Any]:
        return self.call("GET", _of(name))

    def change(self, verb: str, name: str, revision: str | None, reason: str = "") -> dict[str, Any]:
        """promote, rollback, pin, unpin or abandon."""
        return self.call("POST", f"{_of(name)}/{verb}", {"revision": revision, "reason": reason})

    def roll_back(self, name: str, revision: str | None, reason: str = "") -> dict[str, Any]:
        """The revision is settled before the call, so that a proxy which repeats it goes back once."""
        if revision is None and (previous := self.show(name)["previous"]):
            revision = previous.partition("@")[2]
        return self.change("rollback", name, revision, reason)

    def begin_split(self, kind: Kind, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """A canary or shadow; `body` holds the revision, its terms and the reason."""
        return self.call("POST", f"{_of(name)}/{kind}", body)

    def end_split(self, kind: Kind, name: str, reason: str = "") -> dict[str, Any]:
        told = f"?reason={quote(reason, safe='')}" if reason else ""
        return self.call("DELETE", f"{_of(name)}/{kind}{told}")

    def retire(self, name: str, reason: str = "") -> dict[str, Any]:
        return self.call("DELETE", f"{_of(name)}?reason={quote(reason, safe='')}")

    def history(self, name: str | None, limit: int) -> list[dict[str, Any]]:
        path = f"{_of(name)}/history" if name else "/admin/v1/history"
        found: list[dict[str, Any]] = self.call("GET", f"{path}?limit={limit}")["history"]
        return found

    def replicas(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.call("GET", "/admin/v1/replicas")["replicas"]
        return found

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        import httpx

        headers = {"authorization": f"Bearer {self.token}", CALLER_HEADER: _user()}
        try:
            response = httpx.request(method, self.url + path, json=body, headers=headers, timeout=_TIMEOUT_S)
            answer: dict[str, Any] = response.json()
        except (httpx.HTTPError, ValueError) as error:
            raise ServerNotRunning(f"The server at {self.url} gave no usable answer: {error!r}") from error
        if response.is_error:
            raise AdminRefused(answer["error"]["code"], answer["error"]["message"])
        return answer


def _of(name: str) -> str:
    return f"/admin/v1/adapters/{quote(name, safe='')}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return str(os.getuid())
