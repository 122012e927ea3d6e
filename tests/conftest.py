"""What holds for all tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import LoadScopeScheduling

# A busy machine takes any time for an example: how long one takes says nothing about the code.
settings.register_profile("graft", deadline=None)
settings.load_profile("graft")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling | None:
    if config.getoption("dist") != "loadscope":
        return None
    from tests.engine_scheduling import EngineScheduling

    return EngineScheduling(config, log)
