"""Runs a server of this machine in the foreground: starts it, shows what it serves, stops it at a signal."""

from __future__ import annotations

import contextlib
import heapq
import json
import shlex
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from serve.catalogue.state_dir import StateDir
from serve.cli.console import StepProgress, counted, err, new_table, print_line, print_table
from serve.follower.admin_client import AdminClient
from serve.follower.file_watch import FileWatcher, watch_in_thread
from serve.settings import ServeSettings

_SHOWN_MODELS = 50
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def serve_until_stopped(
    pools: Sequence[ServeSettings],
    state: StateDir,
    address: tuple[str, int],
    metrics: tuple[str, int | None],
    adapters: Path | None,
) -> None:
    """`pools`: the settings of each. `address` and `metrics` are hosts and ports; a metrics port of None stands for the
    usual one, 0 for none. `adapters`: an adapters.yaml to follow. Raises PortInUse, EngineStartFailed or NodeLost."""
    # Imported here because it takes seconds, which `--help` need not wait.
    from serve.deployment.local import local_server, metrics_address, wait_while_ray_runs

    for number in _STOP_SIGNALS:
        signal.signal(number, _stop)
    names = " and ".join(f"[bold]{settings.engine.model_name}[/]" for settings in pools)
    err.print(f"Starting {counted(pools[0].all_engines, 'vLLM engine')} for {names} …")
    scrape_address = metrics_address(*metrics)
    progress = StepProgress()
    try:
        with local_server(pools, *address, progress.step, scrape_address) as server:
            progress.close()
            state.announce(server.url, "http://{}:{}/metrics".format(*scrape_address) if scrape_address else None)
            _print_ready(pools, state, server.url)
            with _following(adapters, state, server.metrics):
                wait_while_ray_runs(warn=print_line)
    except KeyboardInterrupt:
        err.print("Stopped.")
    finally:
        progress.close()
        state.withdraw()


def _print_ready(pools: Sequence[ServeSettings], state: StateDir, url: str) -> None:
    catalogue = state.log.read()
    table = new_table("model", "stands for")
    for engine in (settings.engine for settings in pools):
        base = "the base model" if len(pools) == 1 else "a base model"
        table.add_row(engine.model_name, base if engine.max_lora_rank else "merged model")
    for current in heapq.nsmallest(_SHOWN_MODELS, catalogue.current):
        table.add_row(current.name, current.engine_name)
    if len(catalogue.current) > _SHOWN_MODELS:
        table.add_row(f"… {len(catalogue.current) - _SHOWN_MODELS} more", "see GET /v1/models")
    print_table(table, f"Serving at {url}/v1", err)
    print_line(f"Try: {_example_request(pools[0], url)}")
    if metrics := state.running_server().metrics:
        print_line(f"Prometheus: {metrics}")
    err.print("Ctrl-C stops it.")


def _example_request(settings: ServeSettings, url: str) -> str:
    """A command to copy: one line, quoted for a shell."""
    body = {"model": settings.engine.model_name, "messages": [{"role": "user", "content": "Hello!"}]}
    key = ["-H", "authorization: Bearer KEY"] if settings.gateway.keys_file else []
    words = ["curl", f"{url}/v1/chat/completions", *key, "-H", "content-type: application/json"]
    return shlex.join([*words, "-d", json.dumps(body)])


def _following(adapters: Path | None, state: StateDir, metrics: Path) -> contextlib.AbstractContextManager[None]:
    if adapters is None:
        return contextlib.nullcontext()
    return watch_in_thread(FileWatcher(adapters, AdminClient.of(state), print_line, metrics))


def _stop(*_: object) -> NoReturn:
    # Further signals are ignored: a second one must not interrupt the cleanup.
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    err.print("Stopping: running requests may finish …")
    raise KeyboardInterrupt
