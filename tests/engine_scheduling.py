"""Which tests with engines run in one process, where several processes share them (`make test`)."""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling

# Tests of these packages share a server; in another process they would start one more.
SHARED_SERVER = ("tests/e2e/api/", "tests/e2e/main_job/", "tests/e2e/tiers/")
SHARED_SERVER_WITH_KEYS = ("tests/e2e/callers/",)
# Every test of these starts an engine for itself.
NOTHING_SHARED = ("tests/e2e/formats/", "tests/deploy/test_size.py")


class EngineScheduling(LoadScopeScheduling):
    """Hands out the tests of one server, else those of one file, to one process."""

    def _split_scope(self, nodeid: str) -> str:
        for shared in (SHARED_SERVER, SHARED_SERVER_WITH_KEYS):
            if nodeid.startswith(shared):
                return shared[0]
        return nodeid if nodeid.startswith(NOTHING_SHARED) else nodeid.partition("::")[0]
