"""The options of `plan`, `run` and `compare`, in groups with their defaults, and the request that they make.

A command has a parameter for each group that it takes, and `with_groups` gives the command line the options in it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from convert.cli import options
from convert.detection.training import Training

if TYPE_CHECKING:
    from convert.pipeline.request import Request
    from convert.quality import Gate
    from convert.routes.choose import RouteOptions

_TRAININGS: dict[options.TrainedOnOption, Training] = {"4bit": Training.QLORA, "full": Training.LORA}


@dataclass(frozen=True)
class Inputs:
    """What is converted."""

    checkpoint: options.Checkpoint
    base: options.Base
    trained_on: options.TrainedOn = None


@dataclass(frozen=True)
class Route:
    """Which route variant is taken. `compare` has none of these: it takes all variants."""

    route: options.Route = "auto"
    quantize: options.Quantize = "auto"
    merge_onto: options.MergeOnto = "auto"
    dtype: options.Dtype = "auto"
    force: options.Force = False

    def route_options(self) -> RouteOptions:
        from convert.routes.choose import RouteOptions

        return RouteOptions(self.route, self.quantize, self.merge_onto, self.dtype, self.force)


@dataclass(frozen=True)
class Output:
    """How any variant is made, and for which machine."""

    method: options.Method = "rtn"
    calibration: options.Calibration = None
    rank: options.Rank = None
    steps: options.Steps = 60
    target: options.Target = None


@dataclass(frozen=True)
class Limits:
    """What a result must keep to be published, besides the canaries' answers."""

    max_kl: options.MaxKl = None
    min_retention: options.MinRetention = None
    min_gain: options.MinGain = None

    def gate(self) -> Gate:
        from convert.quality import Gate

        return Gate(self.max_kl, self.min_retention, self.min_gain)


def request(inputs: Inputs, output: Output, text: Path | None, **others: Any) -> Request:
    """The request of these options; `others`: fields of Request that not every command has."""
    from convert.pipeline.request import Request

    return Request(
        checkpoint=inputs.checkpoint,
        base=inputs.base,
        trained_on=_TRAININGS[inputs.trained_on] if inputs.trained_on else None,
        method=output.method,
        calibration=output.calibration,
        rank=output.rank,
        steps=output.steps,
        target=output.target,
        text=text,
        **others,
    )


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of its groups in place of the groups, for typer, which reads signatures."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            parameters += _parameters_of(groups[name])
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name]))

    def called(**given: Any) -> None:
        for name, kind in groups.items():
            given[name] = kind(**{field.name: given.pop(field.name) for field in fields(kind)})
        command(**given)

    called.__name__, called.__doc__ = command.__name__, command.__doc__
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called


def _parameters_of(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]
