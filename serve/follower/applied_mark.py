"""Which desired state was applied last: without it, whoever starts anew would undo what was done by hand meanwhile."""

from __future__ import annotations

from convert.artifact.durable_files import replace_file
from serve.catalogue.state_dir import StateDir

_FILE = "adapters.applied"
_PREFIX = "follower"


class AppliedMark:
    """Kept where the catalogue is: the next follower of a bucket may run on another machine.

    There an object is never changed, so each mark gets the next number, and the one before is removed:

        follower/0000000001, 0000000002, …      the digest of a desired state
    """

    def __init__(self, state: StateDir) -> None:
        self._state = state

    def read(self) -> str | None:
        """The digest; None if nothing was applied. Raises StoreUnavailable."""
        if self._state.url is None:
            path = self._state.root / _FILE
            return path.read_text() if path.is_file() else None
        numbers = self._numbers()
        content = self._state.objects.read(f"{_PREFIX}/{numbers[-1]}") if numbers else None
        return content.decode() if content is not None else None

    def write(self, digest: str) -> None:
        """Raises StoreUnavailable."""
        if self._state.url is None:
            replace_file(self._state.root / _FILE, digest.encode())
            return
        numbers = self._numbers()
        number = int(numbers[-1]) + 1 if numbers else 1
        while not self._state.objects.create(f"{_PREFIX}/{number:010}", digest.encode()):
            number += 1
        for former in numbers:
            self._state.objects.delete(f"{_PREFIX}/{former}")

    def _numbers(self) -> list[str]:
        return self._state.objects.names(_PREFIX)
