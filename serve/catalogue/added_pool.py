"""A pool that was added to a running server, as the catalogue records it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import pydantic
from pydantic import AwareDatetime, ConfigDict, Field

from convert.artifact import Name, Sha256
from serve.settings import APP_NAME, NO_POOL_OPTIONS, EngineSettings, PoolOptions, PoolSettings


@pydantic.dataclasses.dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="forbid"))
class AddedPool:
    """Entries of the log and snapshots hold these fields, so their names stay."""

    name: Name = Field(description="What clients write as `model` to reach the base model or merged model.")
    base: Sha256 = Field(description="Fingerprint of the model, which adapters for it name.")
    model_path: Path = Field(description="The model's directory on the server's machine.")
    replicas: Annotated[int, Field(ge=1)] = 1
    max_lora_rank: Annotated[int, Field(ge=0, le=512)] = Field(description="0: no adapters.")
    options: PoolOptions = NO_POOL_OPTIONS
    asleep: Annotated[bool, Field(description="Its engines are stopped until a request comes.")] = False
    woken_at: Annotated[AwareDatetime | None, Field(description="When a request ended its last sleep.")] = None

    @property
    def application(self) -> str:
        """Its application of Ray Serve."""
        return f"{APP_NAME}-{self.name}"

    def settings(self, engine: EngineSettings) -> PoolSettings:
        """The pool as a server runs it whose first pool has these settings of the engine."""
        own = {
            "model_path": self.model_path,
            "model_name": self.name,
            "fingerprint": self.base,
            "max_lora_rank": self.max_lora_rank,
        }
        return PoolSettings(
            engine=self.options.override(engine).model_copy(update=own),
            application=self.application,
            route_prefix=f"/pools/{self.name}",
            replicas=self.replicas,
            sleep_after_s=self.options.sleep_after_s,
            asleep=self.asleep,
            woken_at=self.woken_at,
            added=True,
        )

    def is_same_as(self, other: AddedPool | None) -> bool:
        """Whether both are the same pool with the same settings, asleep or not."""
        return other is not None and self.fallen_asleep() == other.fallen_asleep()

    def fallen_asleep(self) -> AddedPool:
        return replace(self, asleep=True, woken_at=None)

    def woken(self) -> AddedPool:
        return replace(self, asleep=False, woken_at=datetime.now(UTC))
