"""What all settings share."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class FrozenSettings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
