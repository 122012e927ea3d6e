"""The admin API of the server that all tests of this package share."""

from __future__ import annotations

import pytest

from serve.catalogue.state_dir import StateDir
from serve.follower.admin_client import AdminClient
from tests.e2e.conftest import Server


@pytest.fixture(scope="module")
def admin(server: Server) -> AdminClient:
    return AdminClient.of(StateDir(server.state))
