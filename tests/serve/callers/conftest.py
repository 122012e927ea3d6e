"""A gateway that knows its callers is what is asked here."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.gateway import Gateway
from serve.store import AdapterStore
from tests.serve.fakes import FakeEngine
from tests.serve.guarded import Guarded, generate, guarded_gateway


@pytest.fixture
async def server(engine: FakeEngine, store: AdapterStore, tmp_path: Path) -> Guarded:
    engine.handler = generate
    return await guarded_gateway(tmp_path, store, engine)


@pytest.fixture
def gateway(server: Guarded) -> Gateway:
    """Whom `client` asks."""
    return server.gateway
