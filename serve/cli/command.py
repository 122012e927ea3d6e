"""Typer commands that take several options as one pydantic model, so that nothing about an option is said twice."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from operator import getitem
from typing import Annotated, Any, get_type_hints

import typer
from annotated_types import Ge, Gt, Le
from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo
from typer.models import ParameterInfo


def setting(model: type[BaseModel], name: str, note: str = "", **changes: Any) -> Any:
    """A field like the one of a settings model: its default, description and bounds. `note` is appended to the
    description, `changes` are arguments of pydantic's Field that replace those of the setting."""
    field = model.model_fields[name]
    return Field(
        **{
            "default": field.default,
            "description": f"{field.description} {note}".rstrip(),
            "ge": _bound(field, "ge"),
            "le": _bound(field, "le"),
            **changes,
        }
    )


def expand_options(function: Callable[..., None]) -> Callable[..., None]:
    """The function as a command that Typer can read. The first parameter of `function` is a pydantic model: the command
    has an option for each of the model's fields instead, after the function's other parameters."""
    parameters = list(inspect.signature(function).parameters.values())
    types = get_type_hints(function, include_extras=True)
    model: type[BaseModel] = types[parameters[0].name]

    def command(**values: Any) -> None:
        options = {name: values.pop(name) for name in model.model_fields if name in values}
        function(model(**options), **values)

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=types[parameter.name])
        for parameter in parameters[1:]
    ]
    options = [_parameter(name, field) for name, field in model.model_fields.items()]
    command.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
    command.__annotations__ = {}
    return command


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    declared = next((metadata for metadata in field.metadata if isinstance(metadata, ParameterInfo)), None)
    # Annotated[…] as a type checker can't read it: the type is known at run time only.
    annotation = getitem(Annotated, (field.annotation, declared or _option(name, field)))
    default = inspect.Parameter.empty if field.is_required() else field.default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _option(name: str, field: FieldInfo) -> Any:
    # A switch gets its name in full: otherwise Typer adds `--no-…`.
    names = [f"--{name.replace('_', '-')}"] if field.annotation is bool else []
    return typer.Option(*names, help=field.description, min=_bound(field, "ge"), max=_bound(field, "le"))


def _bound(field: FieldInfo, kind: str) -> Any:
    """The least or the largest value. `gt=0`, which Typer doesn't know, is 1 for whole numbers."""
    for constraint in field.metadata:
        if kind == "ge" and isinstance(constraint, Ge):
            return constraint.ge
        if kind == "ge" and isinstance(constraint, Gt) and constraint.gt == 0 and field.annotation is int:
            return 1
        if kind == "le" and isinstance(constraint, Le):
            return constraint.le
    return None
