"""Validation of request bodies that ends at the first wrong item of a list.

pydantic tells everything that is wrong with a body at once. A wrong item of `input` of `/v1/responses` alone gives some
thirty errors, for each kind of message that it isn't, and takes 190 kB of memory: a body of a megabyte would take that
of the machine. One wrong item tells a caller as much. Objects can't be left at their first wrong value, but none of the
API has more keys than a vocabulary has tokens.
"""

from __future__ import annotations

from typing import Any

from pydantic_core import PydanticCustomError, SchemaValidator, core_schema

MOST_KEYS = 1 << 18

_LISTS = ("list", "tuple", "set", "frozenset")


def stop_at_first_error(api: Any) -> None:
    """For every route of the engine's application (a FastAPI) that takes a body."""
    for route in api.routes:
        if field := getattr(route, "body_field", None):
            adapter = field._type_adapter
            # Prebuilt ones of the models in it would be as they were.
            adapter.validator = SchemaValidator(stopping(adapter.core_schema), adapter._config, _use_prebuilt=False)


def stopping(schema: Any) -> Any:
    """A copy of one of pydantic's core schemas whose lists stop at their first error, and whose objects have an end."""
    if isinstance(schema, list):
        return [stopping(it) for it in schema]
    if not isinstance(schema, dict):
        return schema
    copy = {key: stopping(it) for key, it in schema.items()}
    if copy.get("type") in _LISTS:
        copy["fail_fast"] = True
    if copy.get("type") == "dict" and "keys_schema" in copy:
        return core_schema.no_info_before_validator_function(_of_some_size, copy)
    return copy


def _of_some_size(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MOST_KEYS:
        raise PydanticCustomError("too_many_keys", "An object of this API has at most {most} keys", {"most": MOST_KEYS})
    return value
