"""Validates request bodies with the schemas of the engine's application, and finds the field that is wrong where the
application's own validators can't read a body."""

from __future__ import annotations

import logging
from functools import cached_property
from typing import Any

from pydantic_core import PydanticCustomError, SchemaValidator, ValidationError, core_schema

MAX_KEYS = 1 << 18  # of one object in a body; no object of the API has more keys than a vocabulary has tokens

_LISTS = ("list", "tuple", "set", "frozenset")
_AROUND = ("function-before", "function-after", "function-wrap")
_OTHER = ("serialization", "metadata")  # what these hold has another kind of schema
# What Python raises for a value of another type than a function expects.
_WRONG_TYPE = (TypeError, AttributeError, KeyError, IndexError)

logger = logging.getLogger(__name__)


class BodyValidator:
    """Takes the place of pydantic's validator in a TypeAdapter.

    A model may have validators that read a body before pydantic has checked its types. vLLM's iterate over `messages`
    that are null, or ask a list for its keys; what Python says of that would be the answer. So after such an error only
    the types are checked, which gives pydantic's error for the first field that is wrong.
    """

    def __init__(self, schema: Any, config: Any) -> None:
        """`schema`, `config`: pydantic's core schema of the body, and its configuration."""
        self._schema = schema
        self._config = config
        self._complete = self._validator(schema)

    def validate_python(self, value: Any, /, **options: Any) -> Any:
        """As pydantic's validator. Raises ValidationError, and what the application's validators raise on purpose."""
        try:
            return self._complete.validate_python(value, **options)
        except _WRONG_TYPE as error:
            logger.debug("a validator of the application can't read a body", exc_info=True)
            self._check_types(value, options)
            raise _unreadable() from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._complete, name)

    def _check_types(self, value: Any, options: Any) -> None:
        types_only = self._types_only
        try:
            types_only.validate_python(value, **options)
        except _WRONG_TYPE:
            logger.debug("the types of a body can't be checked", exc_info=True)

    @cached_property
    def _types_only(self) -> SchemaValidator:
        return self._validator(without_functions(self._schema))

    def _validator(self, schema: Any) -> SchemaValidator:
        # Without `_use_prebuilt=False` pydantic takes the unchanged validators of the models inside.
        return SchemaValidator(with_fail_fast(schema), self._config, _use_prebuilt=False)


def with_fail_fast(schema: Any) -> Any:
    """A copy of a pydantic core schema whose lists stop at the first invalid item, and whose objects have a limit of
    keys."""
    if isinstance(schema, list):
        return [with_fail_fast(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    copy = {key: with_fail_fast(value) for key, value in schema.items()}
    if copy.get("type") in _LISTS:
        copy["fail_fast"] = True
    if copy.get("type") == "dict" and "keys_schema" in copy:
        return core_schema.no_info_before_validator_function(_check_keys, copy)
    return copy


def without_functions(schema: Any) -> Any:
    """A copy of a pydantic core schema that calls no validators of its models."""
    if isinstance(schema, list):
        return [without_functions(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    kind = schema.get("type")
    if kind in _AROUND:
        copy = without_functions(schema["schema"])
    elif kind == "function-plain":
        copy = core_schema.any_schema()
    else:
        copy = {key: value if key in _OTHER else without_functions(value) for key, value in schema.items()}
    if kind in ("model", "dataclass"):
        copy.pop("post_init", None)
    return copy | ({"ref": schema["ref"]} if "ref" in schema else {})


def _unreadable() -> ValidationError:
    reason = PydanticCustomError("unreadable", "It can't be read: a field is null, or has another type than described")
    return ValidationError.from_exception_data("body", [{"type": reason, "loc": (), "input": None}])


def _check_keys(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_KEYS:
        raise PydanticCustomError("too_many_keys", "An object of this API has at most {most} keys", {"most": MAX_KEYS})
    return value
