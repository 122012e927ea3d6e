"""The command line: `python -m convert inspect | run | verify`."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from pydantic import TypeAdapter, ValidationError

from convert.artifact import Artifact, Name
from convert.detect import Training
from convert.errors import CheckpointUnsupported, ConvertError
from convert.routes.ways import DtypeOption, QuantizeOption, RouteOption

if TYPE_CHECKING:
    from convert.progress import Progress

app = typer.Typer(
    help="From a LoRA or QLoRA checkpoint to an artifact that can be served.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


_TRAININGS = {"4bit": Training.QLORA, "full": Training.LORA}

CheckpointPath = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="Directory with adapter_config.json and adapter_model.safetensors.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, nothing else.")]


@app.command()
def inspect(
    checkpoint: CheckpointPath,
    base: Annotated[
        Path | None,
        typer.Option(metavar="BASE", help="Base model directory or artifact: adds sizes and checks the match."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a checkpoint is and which ways there are to serve it. Reads no weights, writes nothing."""
    from convert import inspection, report

    with _told_errors():
        found = inspection.inspect(checkpoint, base)
        if as_json:
            _print_json(report.inspection_document(found))
        else:
            report.print_page(report.inspection_page(found))
        if found.problems:
            raise CheckpointUnsupported(
                f"{checkpoint} can't be converted: {len(found.problems)} problems, listed above."
            )


@app.command()
def run(
    checkpoint: CheckpointPath,
    base: Annotated[
        Path,
        typer.Option(
            metavar="BASE",
            help="Directory of the model the adapter was trained on, or an artifact with its 4-bit form.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the artifact appears; must not exist yet.")],
    name: Annotated[
        str | None, typer.Option(help="Name under which it is served. Default: the name of DIR, in lower case.")
    ] = None,
    route: Annotated[
        RouteOption,
        typer.Option(help="Keep the adapter separate, or merge it. auto: QLoRA stays separate, LoRA is merged."),
    ] = "auto",
    quantize: Annotated[
        QuantizeOption,
        typer.Option(help="How linear layers are stored. auto: NF4, wherever it keeps what was learnt."),
    ] = "auto",
    dtype: Annotated[
        DtypeOption,
        typer.Option(
            help="16-bit type of a merged model that is not quantized. float16 rounds 8 times finer than bfloat16, "
            "and holds weights up to 65504. auto: the base's own."
        ),
    ] = "auto",
    trained_on: Annotated[
        Literal["4bit", "full"] | None,
        typer.Option(
            help="What the base was in training, when the checkpoint doesn't say: 4bit is QLoRA, full is LoRA."
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='Held-out JSON lines to measure on: {"text": …} or {"messages": […]}. Default: a short text.',
        ),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(min=0.0, metavar="X", help="Publish nothing if the mean KL is above X nats per token."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Compare the result with the model as trained.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Convert a checkpoint to an artifact. It appears at DIR whole, or not at all."""
    served_name = _name(name, out)
    from convert import conversion, report

    request = conversion.Request(
        checkpoint=checkpoint,
        base=base,
        destination=out,
        name=served_name,
        route=route,
        quantize=quantize,
        dtype=dtype,
        trained_on=_TRAININGS[trained_on] if trained_on else None,
        text=text,
        max_kl=max_kl,
        measure=measure,
    )
    signal.signal(signal.SIGTERM, _terminate)
    with _told_errors(), _progress_bar() as progress:
        artifact = conversion.convert(request, progress)
    if as_json:
        _print_json(report.artifact_document(artifact))
    else:
        report.print_page(report.artifact_page(artifact))


@app.command()
def verify(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Directory with a manifest.json.")],
    as_json: JsonOption = False,
) -> None:
    """Hash every file of an artifact and compare with its manifest."""
    from convert import report

    with _told_errors():
        opened = Artifact.open(artifact)
        opened.verify()
    if as_json:
        _print_json(report.artifact_document(opened))
    else:
        typer.echo(f"{artifact} is what its manifest says ({opened.manifest.name}).")


def _name(name: str | None, out: Path) -> str:
    candidate = name if name is not None else out.resolve().name.lower()
    try:
        return TypeAdapter[str](Name).validate_python(candidate)
    except ValidationError:
        hint = "--name" if name is not None else "--out"
        raise typer.BadParameter(
            f"{candidate!r} can't be served under that name: use a-z, 0-9, '.', '_' and '-', at most 64 characters, "
            "beginning and ending with a letter or digit. Give one with --name.",
            param_hint=hint,
        ) from None


@contextmanager
def _told_errors() -> Iterator[None]:
    try:
        yield
    except ConvertError as error:
        typer.echo(f"error[{error.code}]: {error}", err=True)
        raise typer.Exit(1) from None


@contextmanager
def _progress_bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield show


def _print_json(document: dict[str, Any]) -> None:
    json.dump(document, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")


def _terminate(signum: int, frame: object) -> NoReturn:
    """Through the clean-up of everything that is open. Unlike after Ctrl-C, finished shards stay for the next run."""
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    app(prog_name="python -m convert")
