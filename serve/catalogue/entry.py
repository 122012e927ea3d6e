"""One line of the catalogue's history: what was done to which revision, by whom, when and why."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from serve.candidate import Candidate
from serve.split import Split

CALLER_HEADER = "x-graft-caller"  # what a caller of the admin API says of itself

Verb = Literal["stage", "promote", "rollback", "abandon", "retire", "pin", "unpin", "split"]


@dataclass(frozen=True)
class Cause:
    """Who wants a change, and why."""

    by: str = ""
    reason: str = ""


class Entry(BaseModel):
    """Written once, never changed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    verb: Verb = Field(
        description="stage: replicas shall hold it. promote: the alias points to it. rollback: the alias goes back "
        "to it. abandon: a staged revision is given up. retire: the alias goes away. pin, unpin: every replica "
        "holds it, whether it is used or not. split: a staged revision gets a share of the alias's traffic, until the "
        "alias moves or it is abandoned."
    )
    candidate: Candidate
    at: datetime = Field(description="The writer's clock, UTC.")
    by: str = ""
    reason: str = ""
    until: datetime | None = Field(
        default=None, description="A staged revision that is neither promoted nor abandoned by then is given up."
    )
    split: Split | None = Field(default=None, description="With the verb `split` only.")
    id: str = Field(default="", description="Tells a writer whose answer was lost that the entry is its own.")

    @classmethod
    def now(
        cls, verb: Verb, candidate: Candidate, cause: Cause, until: datetime | None = None, split: Split | None = None
    ) -> Entry:
        return cls(
            verb=verb,
            candidate=candidate,
            at=datetime.now(UTC),
            by=cause.by,
            reason=cause.reason,
            until=until,
            split=split,
            id=uuid.uuid4().hex,
        )
