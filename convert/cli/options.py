"""The options that several commands share, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from convert.routes.ways import DtypeOption, OntoOption, QuantizeOption, RouteOption

Training = Literal["4bit", "full"]
MethodOption = Literal["rtn", "gptq", "awq"]

_WHAT = "What is made"
_INPUT = "What goes in"
_MEASURE = "What is measured"
_GATE = "What must hold, or nothing is published"

Checkpoint = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="Directory of the adapter, as the trainer left it.")
]
OptionalBase = Annotated[
    Path | None,
    typer.Option(metavar="BASE", help="Base model directory or artifact: adds sizes and checks the match."),
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
    Training | None,
    typer.Option(
        help="What the base was in training, when the checkpoint doesn't say: 4bit is QLoRA, full is LoRA. "
        "Without it, it is measured.",
        rich_help_panel=_INPUT,
    ),
]
Route = Annotated[
    RouteOption,
    typer.Option(
        help="adapter: stays separate. merge: into the weights. rebase: separate, moved to another base. "
        "recover: distilled back to full precision, then merged. auto: QLoRA stays separate, LoRA is merged.",
        rich_help_panel=_WHAT,
    ),
]
Quantize = Annotated[
    QuantizeOption,
    typer.Option(
        help="How linear layers are stored. auto: the smallest form of the target that keeps what was learnt, "
        "found by measuring.",
        rich_help_panel=_WHAT,
    ),
]
MergeOnto = Annotated[
    OntoOption,
    typer.Option(
        help="Which weights a merge adds the delta to. auto: those it was trained against.", rich_help_panel=_WHAT
    ),
]
Onto = Annotated[
    Path | None,
    typer.Option(
        metavar="MODEL", help="Rebase: the model directory or artifact to move the adapter to.", rich_help_panel=_WHAT
    ),
]
Rank = Annotated[
    int | None,
    typer.Option(
        min=1, max=512, help="Rebase, recover: rank after the correction. Default: twice the rank, at least 64.",
        rich_help_panel=_WHAT,
    ),
]  # fmt: skip
Steps = Annotated[int, typer.Option(min=0, max=200, help="Recover: distillation steps at most.", rich_help_panel=_WHAT)]
Method = Annotated[
    MethodOption,
    typer.Option(
        help="How w4a16 and w8a8-int8 are found: rounding to nearest, or GPTQ or AWQ with calibration text.",
        rich_help_panel=_WHAT,
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Chats or texts to calibrate on, as for --text; not those you measure on.",
        rich_help_panel=_WHAT,
    ),
]  # fmt: skip
Dtype = Annotated[
    DtypeOption,
    typer.Option(
        help="16-bit type of a merged model that is not quantized. float16 rounds 8 times finer than bfloat16, "
        "and holds weights up to 65504. auto: the base's own.",
        rich_help_panel=_WHAT,
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        metavar="TARGET", help="Where it will be served: cpu, cuda:8.0, cuda:9.0, … Default: this machine.",
        rich_help_panel=_WHAT,
    ),
]  # fmt: skip
Force = Annotated[
    bool,
    typer.Option("--force", help="Make also what loses nearly all that was learnt. Not for serving.",
                 rich_help_panel=_WHAT),
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
    typer.Option(min=0.0, metavar="X", help="Mean KL in nats per token, at most.", rich_help_panel=_GATE),
]
MinRetention = Annotated[
    float | None,
    typer.Option(
        max=1.0, metavar="X", help="Share of the delta that survives in every merged weight, at least.",
        rich_help_panel=_GATE,
    ),
]  # fmt: skip
MinGain = Annotated[
    float | None,
    typer.Option(
        max=1.0, metavar="X", help="Share of the fine-tune's gain on the text that is kept, at least.",
        rich_help_panel=_GATE,
    ),
]  # fmt: skip
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, nothing else.")]
