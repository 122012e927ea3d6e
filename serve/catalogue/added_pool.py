"""A pool that was added to a running server, as the catalogue records it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pydantic
from pydantic import ConfigDict, Field

from convert.artifact import Name, Sha256
from serve.settings import APP_NAME, SERVERS_SETTINGS, EngineOverrides, EngineSettings, PoolSettings


@pydantic.dataclasses.dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="forbid"))
class AddedPool:
    """Entries of the log and snapshots hold these fields, so their names stay."""

    name: Name = Field(description="What clients write as `model` to reach the base model or merged model.")
    base: Sha256 = Field(description="Fingerprint of the model, which adapters for it name.")
    model_path: Path = Field(description="The model's directory on the server's machine.")
    replicas: Annotated[int, Field(ge=1)] = 1
    max_lora_rank: Annotated[int, Field(ge=0, le=512)] = Field(description="0: no adapters.")
    engine: EngineOverrides = SERVERS_SETTINGS

    def settings(self, engine: EngineSettings) -> PoolSettings:
        """The pool as a server runs it whose first pool has these settings of the engine."""
        own = {
            "model_path": self.model_path,
            "model_name": self.name,
            "fingerprint": self.base,
            "max_lora_rank": self.max_lora_rank,
        }
        return PoolSettings(
            engine=engine.overridden(self.engine).model_copy(update=own),
            application=f"{APP_NAME}-{self.name}",
            route_prefix=f"/pools/{self.name}",
            replicas=self.replicas,
            added=True,
        )
