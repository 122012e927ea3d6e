"""What serve.deployment.proxy.uvicorn_patches changes and reads in uvicorn."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contracts.contract import Contract, Library
from tests.contracts.own_files import undeclared_attributes
from tests.contracts.renamed import names_of, with_renamed

CONTRACT: Contract = {
    "uvicorn.server:Server": ("config", "server_state", "servers", "lifespan"),
    "uvicorn.server:Server.startup": ("sockets",),
    "uvicorn.config:Config": ("http_protocol_class", "port", "backlog"),
    "uvicorn.lifespan.off:LifespanOff": ("state",),
    "uvicorn.protocols.http.httptools_impl:HttpToolsProtocol": ("transport",),
    "uvicorn.protocols.http.httptools_impl:HttpToolsProtocol.__init__": ("config", "server_state", "app_state"),
    "uvicorn.protocols.http.httptools_impl:HttpToolsProtocol.connection_made": ("transport", "/"),
    "uvicorn.protocols.http.h11_impl:H11Protocol.__init__": ("config", "server_state", "app_state"),
    "uvicorn.protocols.http.h11_impl:H11Protocol.connection_made": ("transport", "/"),
}
PATCHES = Path(__file__).parents[2] / "serve" / "deployment" / "proxy" / "uvicorn_patches.py"


def test_uvicorn_has_what_is_changed_in_it() -> None:
    assert Library("uvicorn").broken(CONTRACT) == []


@pytest.mark.parametrize(("entry", "module", "name"), sorted(names_of(CONTRACT)))
def test_a_renamed_name_is_noticed(entry: str, module: str, name: str, tmp_path: Path) -> None:
    with_renamed(Library("uvicorn"), tmp_path, module, name)

    assert Library("uvicorn", overlay=tmp_path).broken({entry: CONTRACT[entry]})


def test_the_patches_touch_nothing_else() -> None:
    own = {"tests:own": ("connection_made", "_held", "_held_bytes", "_holding")}  # of the classes in the file itself

    assert undeclared_attributes([PATCHES], CONTRACT, own) == []
