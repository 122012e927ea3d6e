"""Requests to servers of Graft go through no proxy: one module makes the clients, and no other makes its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("convert", "serve", "examples", "benchmarks", "deploy")
MAKERS = {
    "serve/follower/http_client.py",
    "serve/callers/signing_keys.py",  # its identity provider may be outside
    "serve/engine/prompt_size.py",  # calls the application in its own process
}
# Of httpx: what connects. The rest are types and errors.
CONNECTING = {"get", "post", "put", "patch", "delete", "head", "options", "request", "stream"} | {
    "Client", "AsyncClient", "HTTPTransport", "AsyncHTTPTransport"
}  # fmt: skip
OPENAI = {"OpenAI", "AsyncOpenAI"}
# Clients that take a proxy from the environment, too.
OTHER_LIBRARIES = {"aiohttp", "httpx2", "requests", "urllib3", "urllib.request"}
# For a client of openai's: without a proxy of the environment.
DIRECT = {"DefaultHttpxClient", "DefaultAsyncHttpxClient"}


def own_clients(source: str) -> Iterator[str]:
    """What a module does to connect without the clients of Graft."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (f"import {name.name}" for name in names if name.name in OTHER_LIBRARIES)
            case ast.ImportFrom(module=str(module), names=names):
                imported = {module, *(f"{module}.{name.name}" for name in names)}
                yield from (f"from {module}" for _ in imported & OTHER_LIBRARIES)
                if module == "httpx":
                    yield from (f"from httpx import {name.name}" for name in names if name.name in CONNECTING)
            case ast.Call(func=ast.Attribute(value=ast.Name("httpx"), attr=attribute)) if attribute in CONNECTING:
                yield f"httpx.{attribute}"
            case ast.Call(func=ast.Name(name) | ast.Attribute(attr=name), keywords=keywords) if name in OPENAI:
                if not any(is_direct(keyword.value) for keyword in keywords if keyword.arg == "http_client"):
                    yield f"{name} without a direct http_client"


def is_direct(client: ast.expr) -> bool:
    match client:
        case ast.Call(func=ast.Name(name), keywords=[ast.keyword("trust_env", ast.Constant(False)), *_]):
            return name in DIRECT
    return False


@pytest.mark.parametrize("package", PACKAGES)
def test_only_one_module_makes_clients_for_servers_of_graft(package: str) -> None:
    found_in = {
        str(path.relative_to(ROOT)): list(own_clients(path.read_text())) for path in (ROOT / package).rglob("*.py")
    }

    assert {path: clients for path, clients in found_in.items() if clients and path not in MAKERS} == {}


@pytest.mark.parametrize(
    "source",
    [
        "httpx.get('http://127.0.0.1')",
        "client: httpx.AsyncClient = httpx.AsyncClient()",
        "from httpx import Client",
        "import urllib.request",
        "from urllib import request",
        "from urllib.request import urlopen",
        "import requests",
        "openai.OpenAI(base_url=url)",
        "openai.OpenAI(base_url=url, http_client=DefaultHttpxClient())",
    ],
)
def test_a_client_of_its_own_is_noticed(source: str) -> None:
    assert list(own_clients(source))


def test_types_and_errors_are_no_clients() -> None:
    source = "def ask(client: httpx.AsyncClient) -> None:\n    raise httpx.HTTPError('')\n"
    source += "OpenAI(http_client=DefaultHttpxClient(trust_env=False))"

    assert list(own_clients(source)) == []
