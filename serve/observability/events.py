"""What happens to adapters in a replica, told to whoever counts it or writes it down."""

from __future__ import annotations

from typing import Literal

from serve.names import AdapterRevision

Level = Literal["gpu", "cpu", "disk"]  # a slot of the engine, its host memory, neither
Left = Literal["evicted", "retired", "lost"]
Drift = Literal["lost", "stranger"]


class Events:
    """Nobody listens. All methods return at once and raise nothing."""

    def loaded(self, adapter: AdapterRevision, fetch_s: float, engine_s: float) -> None:
        """It is resident: its files were brought here, and into the engine."""

    def load_failed(self, adapter: AdapterRevision, why: Exception) -> None: ...

    def left(self, adapter: AdapterRevision, reason: Left) -> None:
        """It is not resident any more."""

    def mended(self, kind: Drift, count: int, what: str) -> None:
        """The engine held something else than it should."""

    def proof_failed(self, adapter: AdapterRevision, why: Exception) -> None: ...

    def followed(self, epoch: int) -> None:
        """The catalogue could be read."""

    def follow_failed(self) -> None: ...

    def changed(self, verb: str, adapter: str, outcome: str, staged_s: float = 0, promoted_s: float = 0) -> None:
        """A change that this replica coordinated has come to its end; `outcome`: done, or an error's code."""

    def identity_checked(self, adapter: AdapterRevision, distance_nats: float, is_itself: bool) -> None:
        """A resident adapter was asked again what it said when it was loaded."""


NOBODY = Events()
