"""One entry of the catalogue's log: what was done to which revision or pool, by whom, when and why."""

from __future__ import annotations

import getpass
import os
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from convert.artifact import Name
from serve.catalogue.added_pool import AddedPool
from serve.catalogue.candidate import Candidate
from serve.catalogue.split import Split

CALLER_HEADER = "x-graft-caller"  # the name that a caller of the admin API gives itself

Verb = Literal["stage", "promote", "rollback", "abandon", "retire", "pin", "unpin", "split", "move"]
PoolVerb = Literal["add_pool", "remove_pool", "sleep_pool", "wake_pool"]


@dataclass(frozen=True)
class Audit:
    """Who makes a change, and why."""

    by: str = ""
    reason: str = ""


def user_name() -> str:
    """Whose process this is: the name, or the number where the system knows no name for it, as in OpenShift's pods."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


class Entry(BaseModel):
    """A change of an adapter. Written once, never changed. Servers read entries of older versions, so the field names
    stay."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    verb: Verb = Field(
        description="stage: every replica loads the revision. promote: the alias points to it. rollback: the alias "
        "points to it again. abandon: its staging ends. retire: the alias is removed. pin: every replica keeps it "
        "loaded even if it is not used. unpin: no longer. split: the staged revision gets a share of the alias's "
        "traffic until the alias moves or the revision is abandoned. move: the alias points to a pool, whose model "
        "answers instead of the adapter; the revision that it pointed to stays loaded."
    )
    candidate: Candidate
    at: datetime = Field(description="The writer's clock, UTC.")
    by: str = ""
    reason: str = ""
    until: datetime | None = Field(
        default=None, description="A staged revision that is not promoted by then is abandoned."
    )
    split: Split | None = Field(default=None, description="With the verb `split` only.")
    pool: Name | None = Field(default=None, description="With the verb `move` only: the name of the pool's model.")
    id: str = Field(default="", description="A writer knows its own entry by it if the store's response was lost.")

    @classmethod
    def now(
        cls,
        verb: Verb,
        candidate: Candidate,
        audit: Audit,
        until: datetime | None = None,
        split: Split | None = None,
        pool: str | None = None,
    ) -> Entry:
        return cls(
            verb=verb,
            candidate=candidate,
            at=datetime.now(UTC),
            by=audit.by,
            reason=audit.reason,
            until=until,
            split=split,
            pool=pool,
            id=uuid.uuid4().hex,
        )


class PoolEntry(BaseModel):
    """A change of the server's pools. Written once, never changed. A server that is older than added
    pools can't read it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    verb: PoolVerb = Field(
        description="add_pool: the server starts a pool, and starts it again whenever it starts itself. remove_pool: "
        "the server stops a pool that was added; its running requests may finish. sleep_pool, wake_pool: the server "
        "stops the engines of a pool that was added, and starts them again."
    )
    pool: AddedPool
    at: datetime = Field(description="The writer's clock, UTC.")
    by: str = ""
    reason: str = ""
    id: str = Field(default="", description="A writer knows its own entry by it if the store's response was lost.")

    @classmethod
    def now(cls, verb: PoolVerb, pool: AddedPool, audit: Audit) -> PoolEntry:
        return cls(verb=verb, pool=pool, at=datetime.now(UTC), by=audit.by, reason=audit.reason, id=uuid.uuid4().hex)


AnyEntry = Annotated[Entry | PoolEntry, Field(discriminator="verb")]
