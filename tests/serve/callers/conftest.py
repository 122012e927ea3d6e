"""The gateway of these tests requires keys; and an identity provider."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.catalogue.adapter_store import AdapterStore
from serve.gateway.app import Gateway
from tests.serve.callers.provider import Provider
from tests.serve.fakes import FakeEngine
from tests.serve.guarded import Guarded, generate, guarded_gateway


@pytest.fixture
async def server(engine: FakeEngine, store: AdapterStore, tmp_path: Path) -> Guarded:
    engine.handler = generate
    return await guarded_gateway(tmp_path, store, engine)


@pytest.fixture
def gateway(server: Guarded) -> Gateway:
    """The gateway that `client` sends its requests to."""
    return server.gateway


@pytest.fixture
def provider() -> Iterator[Provider]:
    provider = Provider()
    yield provider
    provider.close()
