"""`python -m serve`: serve artifacts on this machine, publish to a running server, see what it holds."""

from __future__ import annotations

import heapq
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn
from urllib.parse import quote

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from convert.artifact import Artifact, problems_of
from convert.errors import ConvertError
from serve.admission import objections
from serve.bundle import Bundle
from serve.candidate import Candidate
from serve.catalogue import CatalogueLog
from serve.config import EngineSettings, GatewaySettings, ServeSettings, supported_rank
from serve.errors import AdminRefused, ArtifactRefused, ServeError, ServerNotRunning, StateInvalid
from serve.split import Kind, Terms
from serve.state import StateDir, sha256
from serve.store import AdapterStore

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
State = Annotated[Path, typer.Option("--state", help="Where the catalogue and the adapters live; survives restarts.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]

_SHOWN_MODELS = 50
_TERMS = Terms()
_DEFAULT_STATE = Path("graft-state")
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_err = Console(stderr=True)


@app.command(context_settings={"allow_interspersed_args": True})
def run(
    artifacts: Artifacts,
    state: State = _DEFAULT_STATE,
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
    vllm_arg: Annotated[
        list[str] | None, typer.Option(help="An argument for vLLM, as --vllm-arg=--max-model-len=4096. Repeatable.")
    ] = None,
) -> None:
    """Serve artifacts on this machine until Ctrl-C or SIGTERM.

    Starts a private Ray with one vLLM engine per replica and HAProxy in front. Artifacts with an adapter share
    their 4-bit base; the artifact of a merged model is served alone. What was published into --state before is
    served again.
    """
    with _told_errors():
        bundle = Bundle.of(artifacts, base_name)
        directory = StateDir(state)
        directory.prepare()
        directory.require_unused()
        settings = ServeSettings(
            engine=EngineSettings(
                model_path=bundle.model_path,
                model_name=bundle.model_name,
                fingerprint=bundle.fingerprint,
                max_lora_rank=_max_lora_rank(max_lora_rank, bundle, directory),
                max_active_adapters=max_active_adapters,
                max_resident_adapters=max_resident_adapters,
                vllm_args=tuple(vllm_arg or ()),
            ),
            gateway=GatewaySettings(admin_token_sha256=sha256(directory.admin_token())),
            state_dir=directory.root,
            replicas=replicas,
            gpus_per_replica=gpus_per_replica,
        )
        _register(bundle, settings, directory)
        _serve_until_told(settings, directory, host, port)


@app.command()
def publish(
    artifact: Annotated[Path, typer.Argument(help="An artifact with an adapter for the base that is served.")],
    state: State = _DEFAULT_STATE,
    name: Annotated[str | None, typer.Option(help="Publish under this name; default: the artifact's own.")] = None,
    as_json: AsJson = False,
) -> None:
    """Publish an adapter, or a new revision of one, to the running server.

    Every replica loads it first; then the name points to it everywhere. Requests that are running finish on
    the revision they began with. If one replica can't load it, nothing changes.
    """
    with _told_errors():
        directory = StateDir(state)
        opened = Artifact.open(artifact)
        opened.verify()
        candidate = _candidate(opened, name)
        server = directory.running_server()
        AdapterStore(directory.adapters).put(opened)
        answer = _admin(directory, server.url, "POST", "/admin/v1/adapters", candidate.model_dump())
    if as_json:
        _print_json(answer)
        return
    _err.print(
        f"[bold]{answer['model']}[/] now answers as [bold]{answer['revision']}[/] on {answer['replicas']} replicas "
        f"(staged in {answer['staged_s']} s, switched in {answer['promoted_s']} s)."
    )


@app.command()
def retire(
    name: Annotated[str, typer.Argument(help="The adapter's name, as clients write it.")],
    state: State = _DEFAULT_STATE,
    as_json: AsJson = False,
) -> None:
    """Take an adapter away from the running server.

    New requests for it get a 404, running ones finish. Publishing it, or giving it to `run`, brings it back.
    """
    with _told_errors():
        directory = StateDir(state)
        server = directory.running_server()
        answer = _admin(directory, server.url, "DELETE", f"/admin/v1/adapters/{quote(name, safe='')}")
    if as_json:
        _print_json(answer)
        return
    _err.print(f"[bold]{answer['model']}[/] is retired on {answer['replicas']} replicas.")


Alias = Annotated[str, typer.Argument(metavar="NAME", help="The adapter's name, as clients write it.")]
SecondRevision = Annotated[
    str | None, typer.Argument(metavar="REVISION", help="12 or more digits of a revision that is known.")
]
Share = Annotated[float, typer.Option(min=0, max=1, help="Of the traffic.")]
End = Annotated[bool, typer.Option("--end", help="End it; all traffic goes where the name points.")]


@app.command()
def canary(
    name: Alias,
    revision: SecondRevision = None,
    share: Share = _TERMS.share,
    max_error_rate: Annotated[
        float, typer.Option(min=0, max=1, help="It may fail this share of its requests more often.")
    ] = _TERMS.max_error_rate,
    max_latency_ratio: Annotated[
        float, typer.Option(min=1, help="Its median first byte may take this many times as long.")
    ] = _TERMS.max_latency_ratio,
    min_requests: Annotated[int, typer.Option(min=1, help="Nothing is decided on fewer.")] = _TERMS.min_requests,
    end: End = False,
    state: State = _DEFAULT_STATE,
    as_json: AsJson = False,
) -> None:
    """Give a share of an adapter's callers another revision of it.

    Each caller stays on its side. Every replica loads the revision first. It is given up by itself if it turns out
    worse than the one that the name points to. Publishing it gives it everyone.
    """
    terms = {
        "share": share,
        "max_error_rate": max_error_rate,
        "max_latency_ratio": max_latency_ratio,
        "min_requests": min_requests,
    }
    _split("canary", name, _wanted_revision(revision, end), terms, state, as_json)


@app.command()
def shadow(
    name: Alias,
    revision: SecondRevision = None,
    share: Share = _TERMS.share,
    end: End = False,
    state: State = _DEFAULT_STATE,
    as_json: AsJson = False,
) -> None:
    """Send copies of a share of an adapter's requests to another revision; nobody sees what it answers.

    `status --json` tells how often both said the same. Copies are the first to go when the server is busy.
    """
    _split("shadow", name, _wanted_revision(revision, end), {"share": share}, state, as_json)


def _wanted_revision(revision: str | None, end: bool) -> str | None:
    """None to end it."""
    if end == (revision is not None):
        raise typer.BadParameter("Give either a REVISION or --end.")
    return revision


def _split(kind: Kind, name: str, revision: str | None, terms: dict[str, Any], state: Path, as_json: bool) -> None:
    """Begin it with a revision, end it without."""
    method, body = ("POST", {"revision": revision, **terms}) if revision else ("DELETE", None)
    with _told_errors():
        directory = StateDir(state)
        url = directory.running_server().url
        answer = _admin(directory, url, method, f"/admin/v1/adapters/{quote(name, safe='')}/{kind}", body)
    if as_json:
        _print_json(answer)
        return
    told = f"gets {terms['share']:.0%} of it as {revision}" if revision else "has ended"
    _err.print(f"The {kind} of [bold]{name}[/] {told}, on {answer['replicas']} replicas.")


@app.command()
def status(state: State = _DEFAULT_STATE, as_json: AsJson = False) -> None:
    """What every replica of the running server holds."""
    with _told_errors():
        directory = StateDir(state)
        server = directory.running_server()
        answer = _admin(directory, server.url, "GET", "/admin/v1/replicas")
    if as_json:
        _print_json(answer | {"url": server.url})
        return
    table = Table("replica", "epoch", "adapters in the engine", "running requests", "failures", title=server.url)
    for replica in answer["replicas"]:
        failures = "; ".join(f"{model}: {why}" for model, why in replica["failures"].items())
        held = "\n".join(replica["resident"])
        table.add_row(replica["replica"], str(replica["epoch"]), held, str(replica["running_requests"]), failures)
    Console().print(table)


def _register(bundle: Bundle, settings: ServeSettings, directory: StateDir) -> None:
    """Put the bundle's adapters into store and catalogue; no replica runs yet, so none has to be asked."""
    log = CatalogueLog(directory.catalogue)
    store = AdapterStore(directory.adapters)
    catalogue = log.read()
    for candidate in catalogue.wanted:
        if found := objections(candidate, settings.engine):
            raise StateInvalid(
                f"{settings.state_dir} holds {candidate.adapter}: {'; '.join(found)}; or use another --state."
            )
    for candidate, artifact in bundle.adapters:
        if found := objections(candidate, settings.engine):
            raise ArtifactRefused(f"{artifact.root}: {'; '.join(found)}.")
        store.put(artifact)
        # What was published before stays where the catalogue says it is, and that may be elsewhere by now.
        if not catalogue.was_promoted(candidate.adapter):
            log.stage(candidate)
            log.promote(candidate)


def _max_lora_rank(asked: int | None, bundle: Bundle, directory: StateDir) -> int:
    """What was asked for, rounded up to what vLLM has; else what the artifacts and the catalogue need."""
    if asked is not None:
        return supported_rank(asked) if asked else 0
    wanted = CatalogueLog(directory.catalogue).read().wanted
    return max((bundle.max_lora_rank, *(supported_rank(candidate.rank) for candidate in wanted)))


def _serve_until_told(settings: ServeSettings, directory: StateDir, host: str, port: int) -> None:
    from serve.local import local_server  # brings Ray: seconds that `--help` and `publish` need not wait

    for number in _STOP_SIGNALS:
        signal.signal(number, _stop)
    engine = settings.engine
    _err.print(f"Starting {settings.replicas} vLLM engine(s) for [bold]{engine.model_name}[/] …")
    status = _err.status("Starting Ray …")
    status.start()

    def show(ready: int) -> None:
        status.update(f"{ready} of {settings.replicas} engines ready …")

    try:
        with local_server(settings, host, port, show) as url:
            status.stop()
            directory.announce(url)
            _print_ready(settings, directory, url)
            signal.pause()
    except KeyboardInterrupt:
        _err.print("Stopped.")
    finally:
        status.stop()
        directory.withdraw()


def _print_ready(settings: ServeSettings, directory: StateDir, url: str) -> None:
    catalogue = CatalogueLog(directory.catalogue).read()
    table = Table("model", "stands for", title=f"Serving at {url}/v1")
    table.add_row(settings.engine.model_name, "the base model" if settings.engine.max_lora_rank else "merged model")
    for current in heapq.nsmallest(_SHOWN_MODELS, catalogue.current):
        table.add_row(current.name, current.engine_name)
    if len(catalogue.current) > _SHOWN_MODELS:
        table.add_row(f"… {len(catalogue.current) - _SHOWN_MODELS} more", "see GET /v1/models")
    _err.print(table)
    example = {"model": settings.engine.model_name, "messages": [{"role": "user", "content": "Hello!"}]}
    _err.print(f"Try: curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{json.dumps(example)}'")
    _err.print("Ctrl-C stops it.")


def _candidate(artifact: Artifact, name: str | None) -> Candidate:
    try:
        candidate = Candidate.of(artifact.manifest, name)
    except ValidationError as error:
        raise ArtifactRefused(
            f"{name!r} can't be a name: lower-case letters, digits, '.', '_' and '-' only."
        ) from error
    if candidate is None:
        raise ArtifactRefused(
            f"{artifact.root} holds a merged model, not an adapter. Serve it with: python -m serve run"
        )
    return candidate


def _admin(directory: StateDir, url: str, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Call the admin API of the running server. Raises what it answered, or ServerNotRunning."""
    import httpx

    headers = {"authorization": f"Bearer {directory.admin_token()}"}
    try:
        response = httpx.request(method, url + path, json=body, headers=headers, timeout=180)
        answer: dict[str, Any] = response.json()
    except (httpx.HTTPError, ValueError) as error:
        raise ServerNotRunning(f"The server at {url} gave no usable answer: {error!r}") from error
    if response.is_error:
        raise AdminRefused(answer["error"]["code"], answer["error"]["message"])
    return answer


@contextmanager
def _told_errors() -> Iterator[None]:
    """Prints `error[code]: message` and exits with 1: a user's mistake never shows a traceback."""
    try:
        yield
    except (ServeError, ConvertError) as error:
        _fail(error.code, str(error))
    except ValidationError as error:
        _fail("invalid_settings", problems_of(error))
    except PermissionError as error:
        _fail(StateInvalid.code, str(error))


def _fail(code: str, message: str) -> NoReturn:
    _err.print(f"error[{code}]: {message}", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1)


def _print_json(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document) + os.linesep)


def _stop(*_: object) -> NoReturn:
    # Once is enough: a second signal must not break off the cleaning up.
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _err.print("Stopping: running requests may finish …")
    raise KeyboardInterrupt


if __name__ == "__main__":
    app()
