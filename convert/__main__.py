"""The command line: `python -m convert inspect | plan | run | compare | verify | sign`.

Exit status: 0 done; 1 an error of the input, told as `error[code]: …`; 2 a wrong use of the command; 3 a limit was not
kept and nothing was published; 4 the artifact is not what it should be.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from pydantic import TypeAdapter, ValidationError

from convert import options
from convert.artifact import Artifact, Name
from convert.detect import Training
from convert.errors import CheckpointUnsupported, ConvertError

if TYPE_CHECKING:
    from convert.preparation import Request
    from convert.progress import Progress

app = typer.Typer(
    help="From a LoRA or QLoRA checkpoint to an artifact that can be served.",
    epilog="Exit status: 0 done; 1 wrong input; 2 wrong use; 3 a limit not kept; 4 an artifact is not what it says.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_TRAININGS = {"4bit": Training.QLORA, "full": Training.LORA}
_STATUS = {"quality_gate_failed": 3, "artifact_invalid": 4, "verification_failed": 4}


@app.command()
def inspect(checkpoint: options.Checkpoint, base: options.OptionalBase = None, as_json: options.Json = False) -> None:
    """Say what a checkpoint is and which ways there are to serve it. Writes nothing."""
    from convert import inspection
    from convert.report import inspection as shown
    from convert.report.page import print_page

    with _told_errors():
        found = inspection.inspect(checkpoint, base)
        if as_json:
            _print_json(shown.inspection_document(found))
        else:
            print_page(shown.inspection_page(found))
        if found.problems:
            raise CheckpointUnsupported(
                f"{checkpoint} can't be converted: {len(found.problems)} problems, listed above."
            )


@app.command()
def plan(
    checkpoint: options.Checkpoint,
    base: options.Base,
    route: options.Route = "auto",
    quantize: options.Quantize = "auto",
    merge_onto: options.MergeOnto = "auto",
    rank: options.Rank = None,
    steps: options.Steps = 60,
    method: options.Method = "rtn",
    calibration: options.Calibration = None,
    dtype: options.Dtype = "auto",
    target: options.Target = None,
    trained_on: options.TrainedOn = None,
    text: options.Text = None,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Say what `run` would write, tensor by tensor, and what it would take. Writes nothing."""
    request = _request(**_without(locals(), "as_json"))
    from convert import planning
    from convert.report import plan as shown
    from convert.report.page import print_page

    with _told_errors(), _progress_bar() as progress:
        found = planning.planned(request, progress)
    if as_json:
        _print_json(shown.plan_document(found))
    else:
        print_page(shown.plan_page(found))


@app.command()
def run(
    checkpoint: options.Checkpoint,
    base: options.Base,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the artifact appears; must not exist yet.")],
    name: Annotated[
        str | None, typer.Option(help="Name under which it is served. Default: the name of DIR, in lower case.")
    ] = None,
    route: options.Route = "auto",
    quantize: options.Quantize = "auto",
    merge_onto: options.MergeOnto = "auto",
    rank: options.Rank = None,
    steps: options.Steps = 60,
    method: options.Method = "rtn",
    calibration: options.Calibration = None,
    dtype: options.Dtype = "auto",
    target: options.Target = None,
    trained_on: options.TrainedOn = None,
    text: options.Text = None,
    canaries: options.CanaryFile = None,
    max_kl: options.MaxKl = None,
    min_retention: options.MinRetention = None,
    min_gain: options.MinGain = None,
    measure: options.Measure = True,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Convert a checkpoint to an artifact. It appears at DIR whole, or not at all."""
    request = _request(**_without(locals(), "out", "name", "as_json"))
    served_name = _name(name, out)
    from convert import conversion
    from convert.report import artifact as shown
    from convert.report.page import print_page

    signal.signal(signal.SIGTERM, _terminate)
    with _told_errors(), _progress_bar() as progress:
        artifact = conversion.convert(request, conversion.Destination(out, served_name), progress)
    if as_json:
        _print_json(shown.artifact_document(artifact))
    else:
        print_page(shown.artifact_page(artifact))


@app.command()
def compare(
    checkpoint: options.Checkpoint,
    base: options.Base,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where comparison.html and .json appear; must not exist yet.")
    ],
    way: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROUTE:STORED[:WEIGHTS]",
            help="A way to compare, as merge:none or merge:nf4:original; can be given more than once. "
            "Default: all that are offered.",
        ),
    ] = None,
    speed: Annotated[
        bool, typer.Option("--speed", help="Also start each in vLLM, and measure how fast it decodes.")
    ] = False,
    rank: options.Rank = None,
    steps: options.Steps = 60,
    method: options.Method = "rtn",
    calibration: options.Calibration = None,
    target: options.Target = None,
    trained_on: options.TrainedOn = None,
    text: options.Text = None,
    canaries: options.CanaryFile = None,
    max_kl: options.MaxKl = None,
    min_retention: options.MinRetention = None,
    min_gain: options.MinGain = None,
    as_json: options.Json = False,
) -> None:
    """Make and measure the ways side by side, and draw size against loss. Keeps nothing but the page."""
    request = _request(**_without(locals(), "out", "way", "speed", "as_json"))
    from convert import survey
    from convert.report.page import print_page
    from convert.report.survey import survey_page

    signal.signal(signal.SIGTERM, _terminate)
    with _told_errors(), _progress_bar() as progress:
        surveyed = survey.survey(request, way, speed=speed, progress=progress)
        survey.write_report(surveyed, out)
    if as_json:
        _print_json(json.loads((out / survey.DOCUMENT).read_bytes()))
    else:
        print_page(survey_page(surveyed, out))


@app.command()
def sign(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Directory with a manifest.json.")],
    key: Annotated[Path, typer.Option(help="Ed25519 private key in PEM: openssl genpkey -algorithm ed25519")],
) -> None:
    """Vouch for an artifact's adapter, for servers that take only what a key of theirs has signed.

    Hashes every file first, then writes manifest.sig beside the manifest. The server is started with the public key:
    openssl pkey -in KEY.pem -pubout.
    """
    from convert import signature

    with _told_errors():
        opened = Artifact.open(artifact)
        opened.verify()
        typer.echo(f"signed: {signature.sign(opened, key)}")


@app.command()
def verify(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Directory with a manifest.json.")],
    base: Annotated[
        Path | None,
        typer.Option(metavar="ARTIFACT", help="The artifact with the base, where it lies in another one."),
    ] = None,
    engine: Annotated[
        bool,
        typer.Option(
            "--engine/--no-engine", help="Start it in vLLM and compare with its golden answers, or only hash."
        ),
    ] = True,
    speed: Annotated[bool, typer.Option("--speed", help="Also measure how fast it decodes.")] = False,
    as_json: options.Json = False,
) -> None:
    """Hash every file of an artifact, serve it with vLLM, and compare both with what its manifest says."""
    if engine:
        _verify_in_engine(artifact, base, speed=speed, as_json=as_json)
        return
    from convert.report import artifact as shown

    with _told_errors():
        opened = Artifact.open(artifact)
        opened.verify()
    if as_json:
        _print_json(shown.artifact_document(opened))
    else:
        typer.echo(f"{artifact} is what its manifest says ({opened.manifest.name}).")


def _verify_in_engine(artifact: Path, base: Path | None, *, speed: bool, as_json: bool) -> None:
    from convert.report.page import print_page
    from convert.verification.page import verification_page
    from convert.verification.verify import VerifyOptions
    from convert.verification.verify import verify as verify_artifact

    signal.signal(signal.SIGTERM, _terminate)
    with _told_errors():
        with _progress_bar() as progress:
            found = verify_artifact(
                Artifact.open(artifact),
                Artifact.open(base) if base else None,
                VerifyOptions(speed_streams=(1, 8) if speed else ()),
                progress,
            )
        if as_json:
            _print_json(found.document())
        else:
            print_page(verification_page(found))
        found.require_passed()


def _without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _request(checkpoint: Path, base: Path, trained_on: options.Training | None, **rest: Any) -> Request:
    from convert.preparation import Request
    from convert.quality import Gate
    from convert.routes.choose import Wish

    limits = {name: rest.pop(name, None) for name in ("max_kl", "min_retention", "min_gain")}
    wish = Wish(
        route=rest.pop("route", "auto"),
        quantize=rest.pop("quantize", "auto"),
        onto=rest.pop("merge_onto", "auto"),
        dtype=rest.pop("dtype", "auto"),
        force=rest.pop("force", False),
    )
    return Request(
        checkpoint=checkpoint,
        base=base,
        wish=wish,
        trained_on=_TRAININGS[trained_on] if trained_on else None,
        gate=Gate(**limits),
        **rest,
    )


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
        raise typer.Exit(_STATUS.get(error.code, 1)) from None


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
            bars.update(tasks[what], completed=done, total=total)

        yield show


def _print_json(document: dict[str, Any]) -> None:
    json.dump(document, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")


def _terminate(signum: int, frame: object) -> NoReturn:
    """Through the clean-up of everything that is open. Unlike after Ctrl-C, finished shards stay for the next run."""
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    app(prog_name="python -m convert")
