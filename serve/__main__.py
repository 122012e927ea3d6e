"""`python -m serve`: serve artifacts on this machine, and change and show what a running server serves."""

from __future__ import annotations

import contextlib
import heapq
import json
import signal
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.table import Table

from serve import commands, size_command, split_commands
from serve.bundle import Bundle
from serve.commands import DEFAULT_STATE, LocalOption, StateOption
from serve.config import AdmissionSettings, EngineSettings, GatewaySettings, ServeSettings
from serve.desired import Desired
from serve.output import err, told_errors
from serve.register import needed_rank, register
from serve.remote import AdminClient
from serve.state import StateDir
from serve.watch import Watcher, watching

app = typer.Typer(
    name="graft-serve",
    help="Serve what `convert` published: one base model, many hot-swapped adapters, OpenAI's API.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Artifacts = Annotated[
    list[Path], typer.Argument(help="Directories made by `python -m convert run`, all for one base model.")
]
_SHOWN_MODELS = 50
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@app.command(context_settings={"allow_interspersed_args": True})
def run(
    artifacts: Artifacts,
    state: StateOption = DEFAULT_STATE,
    local: LocalOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    replicas: Annotated[int, typer.Option(min=1, help="Engines; each holds the whole model.")] = 1,
    gpus_per_replica: Annotated[float, typer.Option(min=0, help="GPUs for each engine; 0 runs on the CPU.")] = 0,
    base_name: Annotated[str | None, typer.Option(help="`model` name of the base; default: from its source.")] = None,
    max_lora_rank: Annotated[
        int | None,
        typer.Option(min=0, max=512, help="Largest adapter rank to leave room for; default: what is given needs."),
    ] = None,
    max_active_adapters: Annotated[
        int, typer.Option(min=1, help="Engine slots: different adapters that run at a time.")
    ] = EngineSettings.model_fields["max_active_adapters"].default,
    max_resident_adapters: Annotated[
        int, typer.Option(min=1, help="Adapters that an engine keeps in host memory.")
    ] = EngineSettings.model_fields["max_resident_adapters"].default,
    adapters: Annotated[
        Path | None, typer.Option(help="adapters.yaml: applied when the server is up, and again when it changes.")
    ] = None,
    adapter_root: Annotated[
        list[Path] | None,
        typer.Option(help="A directory that callers of the admin API may name adapters in. Repeatable."),
    ] = None,
    allow_other_template: Annotated[
        bool, typer.Option("--allow-other-template", help="Take adapters trained with another tokenizer or template.")
    ] = False,
    keep_previous: Annotated[
        int, typer.Option(min=0, help="Revisions before the current one that stay loaded, for a rollback at once.")
    ] = 1,
    vllm_arg: Annotated[
        list[str] | None, typer.Option(help="An argument for vLLM, as --vllm-arg=--max-model-len=4096. Repeatable.")
    ] = None,
) -> None:
    """Serve artifacts on this machine until Ctrl-C or SIGTERM.

    Starts a private Ray with one vLLM engine per replica and HAProxy in front. Artifacts with an adapter share
    their 4-bit base; the artifact of a merged model is served alone. What was published into --state before is
    served again.
    """
    with told_errors():
        bundle = Bundle.of(artifacts, base_name)
        directory = StateDir(state, local)
        directory.prepare()
        directory.require_unused()
        desired = Desired.read(adapters) if adapters else None
        ranks = [bundle.max_lora_rank, *(it.rank for it in desired.wanted)] if desired else [bundle.max_lora_rank]
        settings = ServeSettings(
            engine=EngineSettings(
                model_path=bundle.model_path,
                model_name=bundle.model_name,
                fingerprint=bundle.fingerprint,
                max_lora_rank=needed_rank(max_lora_rank, ranks, directory.log.read().wanted),
                max_active_adapters=max_active_adapters,
                max_resident_adapters=max_resident_adapters,
                vllm_args=tuple(vllm_arg or ()),
            ),
            gateway=GatewaySettings(admin_tokens=directory.admin_tokens()),
            admission=AdmissionSettings(
                adapter_roots=tuple(it.absolute() for it in adapter_root or ()),
                allow_other_template=allow_other_template,
            ),
            state_dir=directory.root,
            state_url=directory.url,
            replicas=replicas,
            gpus_per_replica=gpus_per_replica,
            keep_previous=keep_previous,
        )
        register(bundle, settings, directory)
        _serve_until_told(settings, directory, host, port, adapters)


commands.add_to(app)
split_commands.add_to(app)
app.command()(size_command.size)


def _serve_until_told(
    settings: ServeSettings, directory: StateDir, host: str, port: int, adapters: Path | None
) -> None:
    from serve.local import local_server  # brings Ray: seconds that `--help` and `publish` need not wait

    for number in _STOP_SIGNALS:
        signal.signal(number, _stop)
    engine = settings.engine
    err.print(f"Starting {settings.replicas} vLLM engine(s) for [bold]{engine.model_name}[/] …")
    status = err.status("Starting Ray …")
    status.start()

    def show(ready: int) -> None:
        status.update(f"{ready} of {settings.replicas} engines ready …")

    try:
        with local_server(settings, host, port, show) as url:
            status.stop()
            directory.announce(url)
            _print_ready(settings, directory, url)
            with _following(adapters, directory):
                signal.pause()
    except KeyboardInterrupt:
        err.print("Stopped.")
    finally:
        status.stop()
        directory.withdraw()


def _print_ready(settings: ServeSettings, directory: StateDir, url: str) -> None:
    catalogue = directory.log.read()
    table = Table("model", "stands for", title=f"Serving at {url}/v1")
    table.add_row(settings.engine.model_name, "the base model" if settings.engine.max_lora_rank else "merged model")
    for current in heapq.nsmallest(_SHOWN_MODELS, catalogue.current):
        table.add_row(current.name, current.engine_name)
    if len(catalogue.current) > _SHOWN_MODELS:
        table.add_row(f"… {len(catalogue.current) - _SHOWN_MODELS} more", "see GET /v1/models")
    err.print(table)
    example = {"model": settings.engine.model_name, "messages": [{"role": "user", "content": "Hello!"}]}
    err.print(f"Try: curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{json.dumps(example)}'")
    err.print("Ctrl-C stops it.")


def _following(adapters: Path | None, directory: StateDir) -> contextlib.AbstractContextManager[None]:
    if adapters is None:
        return contextlib.nullcontext()
    return watching(Watcher(adapters, AdminClient.of(directory), lambda line: err.print(line, markup=False)))


def _stop(*_: object) -> NoReturn:
    # Once is enough: a second signal must not break off the cleaning up.
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    err.print("Stopping: running requests may finish …")
    raise KeyboardInterrupt


if __name__ == "__main__":
    app()
