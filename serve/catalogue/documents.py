"""The JSON documents of the catalogue: entries, and snapshots. Reading raises StateInvalid for a damaged one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from serve.catalogue.adapter_state import AdapterState
from serve.catalogue.added_pool import AddedPool
from serve.catalogue.catalogue import Catalogue
from serve.catalogue.entry import AnyEntry, Entry, PoolEntry
from serve.errors import StateInvalid

_Document = TypeVar("_Document")


class _Snapshot(BaseModel):
    """The state after the first `epoch` entries."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epoch: int
    adapters: Mapping[str, AdapterState]
    pools: Mapping[str, AddedPool] = {}


_ENTRY = TypeAdapter[Entry | PoolEntry](AnyEntry)
_SNAPSHOT = TypeAdapter(_Snapshot)


def read_entry(content: bytes, location: str) -> Entry | PoolEntry:
    """`location`: for the message of an error."""
    return _parse(_ENTRY, content, location)


def snapshot_of(catalogue: Catalogue) -> bytes:
    """Its document. Without what has to do with pools an older server can read it."""
    snapshot = _Snapshot(epoch=catalogue.epoch, adapters=catalogue.adapters, pools=catalogue.pools)
    return snapshot.model_dump_json(exclude_defaults=True).encode()


def entry_document(entry: Entry | PoolEntry) -> bytes:
    """Its document. An older server can read every entry that has nothing to do with pools."""
    exclude = {"pool"} if isinstance(entry, Entry) and entry.pool is None else None
    return entry.model_dump_json(exclude=exclude).encode()


def read_snapshot(content: bytes, location: str) -> Catalogue:
    """The state that a snapshot holds; `location`: for the message of an error."""
    snapshot = _parse(_SNAPSHOT, content, location)
    return Catalogue(snapshot.epoch, snapshot.adapters, snapshot.pools)


def _parse(kind: TypeAdapter[_Document], content: bytes, location: str) -> _Document:
    try:
        return kind.validate_json(content)
    except ValidationError as error:
        raise StateInvalid(
            f"The catalogue entry {location} can't be read: {error}. "
            "Restore it from a backup, or start with a new --state directory and publish again."
        ) from error
