"""What the rest of the serving side needs of an inference engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from starlette.types import ASGIApp

from serve.names import AdapterRevision


class Engine(Protocol):
    """One base model with room for adapters, speaking the OpenAI API itself."""

    @property
    def api(self) -> ASGIApp:
        """The engine's own HTTP application: it takes engine names as `model`, and has routes that must
        never be reachable from outside."""
        ...

    @property
    def openapi(self) -> Mapping[str, Any]:
        """The OpenAPI document of `api`, with all of its routes."""
        ...

    @property
    def is_dead(self) -> bool:
        """True once the engine can answer nothing any more."""
        ...

    @property
    def max_running_requests(self) -> int:
        """How many it works on at a time; it queues what is beyond."""
        ...

    @property
    def running_requests(self) -> int:
        """Requests it is working on or has queued."""
        ...

    @property
    def vocabulary_size(self) -> int: ...

    @property
    def context_tokens(self) -> int:
        """The longest request it takes."""
        ...

    @property
    def gives_prompt_logprobs(self) -> bool:
        """Whether a request may ask for the log-probabilities of its own prompt."""
        ...

    async def logprobs(
        self, adapter: AdapterRevision | None, token_ids: Sequence[int], positions: Sequence[int]
    ) -> tuple[float, ...]:
        """Log-probability, in nats, of the token at each position (1 or more) given all those before it, by a
        resident adapter or by the base model alone."""
        ...

    async def load_adapter(self, adapter: AdapterRevision, path: Path) -> None:
        """Make it answer under its engine name. Raises AdapterUnavailable with the engine's reason."""
        ...

    async def unload_adapter(self, adapter: AdapterRevision) -> None: ...

    async def resident_adapters(self) -> frozenset[AdapterRevision]:
        """What the engine itself says it holds."""
        ...

    async def unload_strangers(self) -> int:
        """Unload what it holds though nobody asked for it, as after an unload that failed; how many."""
        ...

    async def check_health(self) -> None:
        """Raises if the engine is dead."""
        ...
