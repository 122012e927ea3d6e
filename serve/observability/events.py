"""Events of adapters in a replica, for the recorder that counts and logs them."""

from __future__ import annotations

from typing import Literal

from serve.names import AdapterRevision

Level = Literal["gpu", "cpu", "disk"]  # a slot of the engine, its host memory, neither
UnloadReason = Literal["evicted", "retired", "lost"]
Drift = Literal["lost", "stranger"]


class Events:
    """Ignores all events. Methods return at once and raise nothing."""

    def loaded(self, adapter: AdapterRevision, fetch_s: float, engine_s: float) -> None:
        """The adapter is resident; seconds that fetching its files and loading them into the engine took."""

    def load_failed(self, adapter: AdapterRevision, why: Exception) -> None: ...

    def unloaded(self, adapter: AdapterRevision, reason: UnloadReason) -> None:
        """The adapter is no longer resident."""

    def drift_repaired(self, kind: Drift, count: int, description: str) -> None:
        """`count` differences between what the engine held and what it should hold were repaired."""

    def verification_failed(self, adapter: AdapterRevision, why: Exception) -> None: ...

    def followed(self, epoch: int) -> None:
        """The catalogue was read."""

    def follow_failed(self) -> None: ...

    def changed(self, verb: str, adapter: str, outcome: str, staged_s: float = 0, promoted_s: float = 0) -> None:
        """A change that this replica coordinated has ended; `outcome`: done, or the code of an error."""

    def identity_checked(self, adapter: AdapterRevision, distance_nats: float, is_itself: bool) -> None:
        """A resident adapter's answer was compared with the one from when it was loaded."""


NO_EVENTS = Events()
