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

from serve import advise_command, commands, exporter_command, key_commands, size_command, split_commands, usage_commands
from serve.bundle import Bundle
from serve.commands import DEFAULT_STATE, LocalOption, StateOption
from serve.config import (
    AdmissionSettings,
    EngineSettings,
    GatewaySettings,
    LogSettings,
    OidcSettings,
    ServeSettings,
    TracingSettings,
)
from serve.desired import Desired
from serve.errors import KeysInvalid, KeysMissing
from serve.keys import KeyFile
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
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
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
    trusted_key: Annotated[
        list[Path] | None,
        typer.Option(help="A public key: adapters that none of them signed are refused. Repeatable."),
    ] = None,
    keys_file: Annotated[
        Path | None,
        typer.Option(help="Keys of callers; default: keys.json of the state directory, if `key create` made one."),
    ] = None,
    open_to_all: Annotated[
        bool, typer.Option("--open", help="Ask callers for no key, even where others can reach the server.")
    ] = False,
    oidc_file: Annotated[
        Path | None, typer.Option(help="OidcSettings as JSON: an identity provider whose tokens are taken as keys too.")
    ] = None,
    limits_url: Annotated[
        str | None,
        typer.Option(help="A Redis that counts the limits of keys, as redis://HOST:PORT/0; default: memory."),
    ] = None,
    keep_previous: Annotated[
        int, typer.Option(min=0, help="Revisions before the current one that stay loaded, for a rollback at once.")
    ] = 1,
    sync_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds after which a publish gives up on a replica that doesn't answer.")
    ] = ServeSettings.model_fields["sync_timeout_s"].default,
    metrics_port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port for Prometheus; default: 9464, or any if it is taken; 0: none."),
    ] = None,
    metrics_host: Annotated[str, typer.Option(help="Address of that port; 0.0.0.0 for all.")] = "127.0.0.1",
    traces: Annotated[
        str | None, typer.Option(help="OTLP receiver of traces, as http://HOST:4318/v1/traces; default: none.")
    ] = None,
    log_format: Annotated[str, typer.Option(help="json or text: the replicas' logs, in logs/ of the state.")] = "json",
    access_sample: Annotated[
        float, typer.Option(min=0, max=1, help="Share of good answers that get a line in the log.")
    ] = LogSettings.model_fields["access_sample"].default,
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
        oidc = _issuer(oidc_file) if oidc_file else None
        keys = _keys(directory, keys_file, host, open_to_all=open_to_all or oidc is not None)
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
            gateway=GatewaySettings(
                admin_tokens=directory.admin_tokens(), keys_file=keys, oidc=oidc, limits_url=limits_url
            ),
            admission=AdmissionSettings(
                adapter_roots=tuple(it.absolute() for it in adapter_root or ()),
                allow_other_template=allow_other_template,
                trusted_keys=tuple(it.absolute() for it in trusted_key or ()),
            ),
            log=LogSettings.model_validate(
                {"format": log_format, "directory": directory.root / "logs", "access_sample": access_sample}
            ),
            tracing=TracingSettings(endpoint=traces),
            state_dir=directory.root,
            state_url=directory.url,
            replicas=replicas,
            gpus_per_replica=gpus_per_replica,
            keep_previous=keep_previous,
            sync_timeout_s=sync_timeout,
        )
        register(bundle, settings, directory)
        _serve_until_told(settings, directory, (host, port), (metrics_host, metrics_port), adapters)


commands.add_to(app)
exporter_command.add_to(app)
split_commands.add_to(app)
app.command()(size_command.size)
advise_command.add_to(app)
key_commands.add_to(app)
usage_commands.add_to(app)


def _keys(directory: StateDir, given: Path | None, host: str, *, open_to_all: bool) -> Path | None:
    """The file of keys that callers need one of; None if they need none. Raises KeysInvalid or KeysMissing."""
    path = given or (directory.keys_file if directory.keys_file.exists() and not open_to_all else None)
    if path:
        KeyFile.read(path)  # told here rather than by every replica
        return path.absolute()
    if host not in _LOOPBACK and not open_to_all:
        raise KeysMissing(host)
    return None


def _issuer(path: Path) -> OidcSettings:
    """Raises KeysInvalid, or ValidationError."""
    try:
        return OidcSettings.model_validate_json(path.read_bytes())
    except OSError as error:
        raise KeysInvalid(f"Can't read {path}: {error.strerror}.") from error


def _serve_until_told(
    settings: ServeSettings,
    directory: StateDir,
    address: tuple[str, int],
    metrics: tuple[str, int | None],
    adapters: Path | None,
) -> None:
    # Brings Ray: seconds that `--help` need not wait.
    from serve.local import local_server, metrics_address, wait_while_ray_runs

    for number in _STOP_SIGNALS:
        signal.signal(number, _stop)
    engine = settings.engine
    err.print(f"Starting {settings.replicas} vLLM engine(s) for [bold]{engine.model_name}[/] …")
    status = err.status("Starting Ray …")
    status.start()

    told_at = metrics_address(*metrics)

    def show(ready: int) -> None:
        status.update(f"{ready} of {settings.replicas} engines ready …")

    try:
        with local_server(settings, *address, show, told_at) as url:
            status.stop()
            directory.announce(url, f"http://{told_at[0]}:{told_at[1]}/metrics" if told_at else None)
            _print_ready(settings, directory, url)
            with _following(adapters, directory):
                wait_while_ray_runs()
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
    key = "-H 'authorization: Bearer KEY' " if settings.gateway.keys_file else ""
    err.print(
        f"Try: curl {url}/v1/chat/completions {key}-H 'content-type: application/json' -d '{json.dumps(example)}'"
    )
    if metrics := directory.running_server().metrics:
        err.print(f"Prometheus: {metrics}")
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
