"""The interface between the serving side and an inference engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from starlette.types import ASGIApp

from serve.engine.prompt_size import PromptSize
from serve.names import AdapterRevision


class Engine(Protocol):
    """An engine with one base model and its LoRA adapters, which has an OpenAI application of its own."""

    @property
    def api(self) -> ASGIApp:
        """The engine's own HTTP application. It takes engine names as `model`, and has routes that callers must not
        reach."""
        ...

    @property
    def openapi(self) -> Mapping[str, Any]:
        """The OpenAPI document of `api` with all of its routes."""
        ...

    @property
    def is_dead(self) -> bool:
        """True once the engine can't answer requests any more; it doesn't recover."""
        ...

    @property
    def max_running_requests(self) -> int:
        """How many requests of callers the engine runs at a time. Beside them it has a place for checks of a revision;
        further requests it queues."""
        ...

    @property
    def running_requests(self) -> int:
        """The requests that the engine runs or has queued."""
        ...

    @property
    def vocabulary_size(self) -> int: ...

    @property
    def context_tokens(self) -> int:
        """The most tokens of a prompt and its completion together."""
        ...

    @property
    def prompt_size(self) -> PromptSize:
        """How many tokens the text of a body gives, as it was measured at the start."""
        ...

    @property
    def supports_prompt_logprobs(self) -> bool:
        """Whether a request may ask for log-probabilities of its own prompt."""
        ...

    @property
    def runs_tools(self) -> bool:
        """Whether the engine itself can run tools of a request, such as a web search."""
        ...

    async def logprobs(
        self, adapter: AdapterRevision | None, token_ids: Sequence[int], positions: Sequence[int]
    ) -> tuple[float, ...]:
        """The log-probability, in nats, of the token at each position (1 or more) given all tokens before it, computed
        with a resident adapter or with the base model alone."""
        ...

    async def load_adapter(self, adapter: AdapterRevision, path: Path) -> None:
        """Loads the adapter, whose files are in `path`, under its engine name. Raises AdapterUnavailable with the
        engine's reason."""
        ...

    async def unload_adapter(self, adapter: AdapterRevision) -> None: ...

    async def resident_adapters(self) -> frozenset[AdapterRevision]:
        """The adapters that the engine itself reports as loaded."""
        ...

    async def unload_unknown(self) -> int:
        """Unloads adapters that were not loaded through this object or that failed to unload. Returns their number."""
        ...

    async def check_health(self) -> None:
        """Raises if the engine is dead."""
        ...
