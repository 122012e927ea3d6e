"""Every option that several commands have: its name, its help and its panel. `option_groups` puts them together."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from convert.routes.variants import DtypeOption, OntoOption, QuantizeOption, RouteOption

TrainedOnOption = Literal["4bit", "full"]
MethodOption = Literal["rtn", "gptq", "awq"]

_OUTPUT = "Output"
_INPUT = "Input"
_MEASURE = "Measurement"
_GATE = "Limits: where one is missed, nothing is published"


def _limit(value: float | None) -> float | None:
    """Raises BadParameter for NaN: no figure is above or below it, so that it would be no limit."""
    if value is not None and math.isnan(value):
        raise typer.BadParameter("nan is no number that a figure can be compared with.")
    return value


Checkpoint = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="Directory of the adapter, as the trainer left it.")
]
OptionalBase = Annotated[
    Path | None,
    typer.Option(
        metavar="BASE",
        help="Base model directory or artifact: to show sizes, and to check that it fits the checkpoint.",
    ),
]
Base = Annotated[
    Path,
    typer.Option(
        metavar="BASE",
        help="Directory of the model the adapter was trained on, or an artifact with its 4-bit form.",
        rich_help_panel=_INPUT,
    ),
]
TrainedOn = Annotated[
    TrainedOnOption | None,
    typer.Option(
        help="How the base was loaded in training: 4bit is QLoRA, full is LoRA. "
        "Default: what the trainer's files say, or else a measurement.",
        rich_help_panel=_INPUT,
    ),
]
Route = Annotated[
    RouteOption,
    typer.Option(
        metavar="ROUTE",
        help="adapter: stays separate. merge: is added to the weights. rebase: stays separate, corrected for another "
        "base. recover: is distilled back to full precision, then merged. auto: QLoRA adapter, LoRA merge.",
        rich_help_panel=_OUTPUT,
    ),
]
Quantize = Annotated[
    QuantizeOption,
    typer.Option(
        metavar="FORMAT",
        help="How linear layers are stored: none (16 bits), nf4, w8a8-int8, fp8-dynamic or w4a16. auto: the smallest "
        "format that the target serves and that, by measurement, keeps what was learnt.",
        rich_help_panel=_OUTPUT,
    ),
]
MergeOnto = Annotated[
    OntoOption,
    typer.Option(
        metavar="WEIGHTS",
        help="Which weights a merge adds the delta to: original, or dequantized from 4 bits. auto: those that the "
        "adapter was trained on.",
        rich_help_panel=_OUTPUT,
    ),
]
Rank = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        max=512,
        help="rebase, recover: rank of the new adapter. Default: twice the old rank and at least 64, raised to "
        "the next rank that vLLM serves.",
        rich_help_panel=_OUTPUT,
    ),
]
Steps = Annotated[
    int,
    typer.Option(
        metavar="N", min=0, max=200, help="recover: maximum number of distillation steps.", rich_help_panel=_OUTPUT
    ),
]
Method = Annotated[
    MethodOption,
    typer.Option(
        metavar="METHOD",
        help="How w4a16 and w8a8-int8 weights are chosen: rtn (rounded to nearest), or gptq or awq with calibration "
        "text.",
        rich_help_panel=_OUTPUT,
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Chats or texts to calibrate on, in the format of --text, but other rows.",
        rich_help_panel=_OUTPUT,
    ),
]  # fmt: skip
Dtype = Annotated[
    DtypeOption,
    typer.Option(
        metavar="DTYPE",
        help="16-bit type of a merged model that is not quantized: bfloat16 or float16. float16 rounds 8 times finer, "
        "and holds weights up to 65504. auto: the base's own.",
        rich_help_panel=_OUTPUT,
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        metavar="TARGET", help="Machine that will serve it: cpu, cpu:avx512-vnni, cuda:9.0, … Default: this machine.",
        rich_help_panel=_OUTPUT,
    ),
]  # fmt: skip
Force = Annotated[
    bool,
    typer.Option("--force", help="Allow a conversion that loses nearly all of what was learnt. Not for serving.",
                 rich_help_panel=_OUTPUT),
]  # fmt: skip
Text = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help='Held-out JSON lines to measure on: {"text": …} or {"messages": […]}. Default: a short text.',
        rich_help_panel=_MEASURE,
    ),
]
CanaryFile = Annotated[
    Path | None,
    typer.Option(
        "--canaries",
        metavar="FILE",
        help='Questions the result must answer: JSON lines {"messages": […], "expect": "…"}.',
        rich_help_panel=_MEASURE,
    ),
]
Measure = Annotated[
    bool,
    typer.Option(
        "--measure/--no-measure", help="Compare the result with the model as trained.", rich_help_panel=_MEASURE
    ),
]
MaxKl = Annotated[
    float | None,
    typer.Option(
        min=0.0, metavar="X", help="Maximum mean KL, in nats per token.", rich_help_panel=_GATE, callback=_limit
    ),
]
MinRetention = Annotated[
    float | None,
    typer.Option(
        max=1.0, metavar="X", help="Minimum share of the delta that each merged weight keeps.",
        rich_help_panel=_GATE, callback=_limit,
    ),
]  # fmt: skip
MinGain = Annotated[
    float | None,
    typer.Option(
        max=1.0, metavar="X", help="Minimum share of the fine-tune's gain on the text that the result keeps.",
        rich_help_panel=_GATE, callback=_limit,
    ),
]  # fmt: skip
ArtifactDirectory = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Directory with a manifest.json.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, nothing else.")]
