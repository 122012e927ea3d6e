"""The server's side in a few lines, and an adapters.yaml."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serve.catalogue.state_dir import StateDir
from serve.follower.admin_client import AdminClient
from serve.follower.desired_state import DesiredState
from tests.serve.conftest import MakeArtifact


class RecordingClient(AdminClient):
    """The server's side in a few lines: what was asked of it, and what it lists then."""

    listed: list[dict[str, Any]]
    listed_pools: list[dict[str, Any]]
    calls: list[str]
    fails: dict[str, Exception]

    def __init__(self, root: Path) -> None:
        super().__init__(StateDir(root), "http://nowhere", "token")
        for name, value in (("listed", []), ("listed_pools", []), ("calls", []), ("fails", {})):
            object.__setattr__(self, name, value)

    def adapters(self) -> list[dict[str, Any]]:
        return self.listed

    def publish(self, path: Path, name: str | None = None, **options: Any) -> dict[str, Any]:
        return self._take(f"publish {name}", name or "")

    def change(self, verb: str, name: str, revision: str | None, reason: str = "") -> dict[str, Any]:
        return self._take(f"{verb} {name}", name)

    def retire(self, name: str, reason: str = "") -> dict[str, Any]:
        return self._take(f"retire {name}", name)

    def pools(self) -> list[dict[str, Any]]:
        return self.listed_pools

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Only a pool that is added gets here: what AdminClient itself asks of the server."""
        assert (method, path) == ("POST", "/admin/v1/pools")
        fields = dict(body or {})
        artifact, name = Path(fields.pop("path")).name, fields.pop("name")
        asked = f"add {artifact} {name} {fields.pop('replicas')} {fields.pop('max_lora_rank')}"
        fields.pop("reason")
        own = (str(tuple(value) if isinstance(value, list) else value) for value in fields.values())
        self._take(" ".join([asked, *own]), artifact)
        return {"name": name or artifact}

    def wait_for_pool(self, name: str, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
        return self._take(f"wait {name}", name)

    def remove_pool(self, name: str, reason: str = "") -> dict[str, Any]:
        return self._take(f"remove {name}", name)

    def _take(self, call: str, name: str) -> dict[str, Any]:
        self.calls.append(call)
        if name in self.fails:
            raise self.fails[name]
        return {}


@pytest.fixture
def client(tmp_path: Path) -> RecordingClient:
    return RecordingClient(tmp_path)


@pytest.fixture
def file(tmp_path: Path, make_artifact: MakeArtifact) -> Path:
    make_artifact("a", name="pirate", weights="1")
    make_artifact("b", name="json", weights="2")
    path = tmp_path / "adapters.yaml"
    path.write_text("adapters:\n  - artifact: a\n    pinned: true\n  - {artifact: b, name: table}\n")
    return path


def listing(desired: DesiredState, *others: str, pinned: bool = True) -> list[dict[str, Any]]:
    """What the admin API lists when all is as desired, and other names."""
    rows = [
        {
            "name": entry.adapter.name,
            "current": entry.adapter.engine_name,
            "pinned": [entry.adapter.engine_name] if entry.pinned and pinned else [],
        }
        for entry in desired.adapters
    ]
    return [
        *rows,
        *({"name": name, "current": f"{name}@{'0' * 12}", "pinned": [f"{name}@{'0' * 12}"]} for name in others),
    ]
