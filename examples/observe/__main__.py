"""Graft as an operator sees it: the demo's server under a small mixed load, with Prometheus and Grafana.

python -m examples.observe                 until Ctrl-C
python -m examples.observe --seconds 120   then asks every query of every dashboard, and fails if one has no data
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from rich.console import Console

from examples import demo
from examples.observe import grafana, prometheus
from examples.observe.load import load
from examples.observe.queries import panel_queries, without_data
from examples.server import running_server
from serve.ports import free_port

BUILD = Path("build/observe")
STATE = BUILD / "state"
ZEPHYR, ZEPHYR_2, PIRATE = (demo.ARTIFACTS / name for name in ("zephyr", "zephyr-2", "pirate"))
# More adapters than slots, so that there are loads and evictions to be seen.
MORE = ("parrot", "corsair", "sailor")
OPTIONS = ("--base-name", demo.BASE_NAME, "--max-active-adapters", "2", "--max-resident-adapters", "4",
           "--access-sample", "1", "--vllm-arg=--max-model-len=2048")  # fmt: skip
CHANGE_EVERY_S = 30

console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="end after so long, and check every query (default: go on)")
    parser.add_argument("--replicas", type=int, default=1, help="vLLM engines")
    parser.add_argument("--record", type=Path, help="keep what the panels show as JSON, to draw them from")
    options = parser.parse_args()
    if not prometheus.is_here():
        sys.exit("Prometheus is not installed. Debian, Ubuntu: apt-get install prometheus; else: "
                 "https://prometheus.io/download. Then run this again.")  # fmt: skip
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    if not all(path.is_dir() for path in (ZEPHYR, ZEPHYR_2, PIRATE)):
        demo.make_checkpoints()
        demo.convert_all()
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(run(options.seconds, options.replicas, options.record))


def run(seconds: float | None, replicas: int, record: Path | None) -> int:
    """0 if every query had data, or nobody asked."""
    shutil.rmtree(STATE, ignore_errors=True)
    BUILD.mkdir(parents=True, exist_ok=True)
    port = free_port()
    words = (*OPTIONS, "--replicas", str(replicas), "--metrics-port", str(port))
    with contextlib.ExitStack() as stack:
        console.print(f"Starting {replicas} vLLM engine(s) …")
        url = stack.enter_context(running_server([PIRATE, ZEPHYR], STATE, *words, log=BUILD / "server.log"))
        told = stack.enter_context(prometheus.running_prometheus([f"127.0.0.1:{port}"], BUILD / "prometheus"))
        overview = stack.enter_context(grafana.running_grafana(told.url, BUILD / "grafana"))
        console.print(f"Server: {url}/v1   Metrics: http://127.0.0.1:{port}/metrics   Logs: {STATE / 'logs'}")
        console.print(f"Prometheus: {told.url}/alerts")
        console.print(f"Grafana: {overview}" if overview else
                      f"Grafana is not installed here: import {grafana.DASHBOARDS}/*.json into yours.")  # fmt: skip
        began = time.monotonic()
        asyncio.run(under_load(url, seconds))
        if seconds is None:
            return 0
        took_s = time.monotonic() - began
        if record:
            keep(told, record, took_s)
        return tell(told, took_s)


async def under_load(url: str, seconds: float | None) -> None:
    models = ["zephyr", "pirate", demo.BASE_NAME, *MORE]
    asking = asyncio.create_task(load(url, models))
    changing = asyncio.create_task(change())
    await asyncio.wait({asking, changing}, timeout=seconds)
    for task in (asking, changing):
        task.cancel()
    await asyncio.gather(asking, changing, return_exceptions=True)


async def change() -> None:
    """Publish more adapters, then let one name go back and forth, with a canary between."""
    for name in MORE:
        await serve("publish", PIRATE, "--name", name)
    await serve("publish", ZEPHYR_2, "--name", "zephyr", "--stage-only")
    with contextlib.suppress(asyncio.CancelledError):
        revision = await staged("zephyr")
        await serve("canary", "zephyr", revision, "--share", "0.3")
        while True:
            await asyncio.sleep(CHANGE_EVERY_S)
            await serve("promote", f"zephyr@{revision}")
            await serve("publish", ZEPHYR_2, "--name", "parrot")
            await asyncio.sleep(CHANGE_EVERY_S)
            await serve("rollback", "zephyr")
            await serve("canary", "zephyr", revision, "--share", "0.3")


async def staged(name: str) -> str:
    shown = json.loads(await serve("show", name, "--json"))
    digest: str = next(it["digest"] for it in shown["revisions"] if it["staged"])
    return digest[:12]


async def serve(*words: str | Path) -> str:
    """`python -m serve …` on this server; what it printed."""
    command = [sys.executable, "-m", "serve", *map(str, words), "--state", str(STATE)]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, error = await process.communicate()
    if process.returncode:
        console.print(f"serve {words[0]}: {error.decode()}", markup=False)
    return output.decode()


def tell(told: prometheus.Prometheus, seconds: float) -> int:
    empty = without_data(told, seconds)
    for query in empty:
        console.print(f"no data: {query}", markup=False)
    count = len(list(panel_queries()))
    console.print(f"{count - len(empty)} of {count} queries have data; firing: {sorted(told.firing()) or 'nothing'}")
    return bool(empty)


def keep(told: prometheus.Prometheus, record: Path, seconds: float) -> None:
    """What every panel shows, for deploy/dashboards/render."""
    shown = {it.expression: told.query_range(it.expression, seconds, step_s=2) for it in panel_queries()}
    record.write_text(json.dumps(shown))
    scraped = told.query("up")[0]["metric"]["instance"]
    with urllib.request.urlopen(f"http://{scraped}/metrics") as response:  # nosec B310
        record.with_suffix(".prom").write_bytes(response.read())


if __name__ == "__main__":
    main()
