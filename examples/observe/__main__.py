"""Runs the server of the demo under a small mixed load, with Prometheus and Grafana.

python -m examples.observe                 runs until Ctrl-C
python -m examples.observe --seconds 120   then runs every query of every dashboard, and fails if one has no data
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
from pathlib import Path

from rich.console import Console

from examples import demo
from examples.observe import grafana, prometheus
from examples.observe.load import load
from examples.observe.queries import panel_queries, without_data
from examples.server import running_server
from serve.deployment.ports import free_port
from serve.follower.http_client import direct_client

BUILD = Path("build/observe")
STATE = BUILD / "state"
ZEPHYR, ZEPHYR_2, PIRATE = (demo.ARTIFACTS / name for name in ("zephyr", "zephyr-2", "pirate"))
# More adapters than slots, so that adapters are loaded and evicted.
MORE = ("parrot", "corsair", "sailor")
OPTIONS = ("--base-name", demo.BASE_NAME, "--max-active-adapters", "2", "--max-resident-adapters", "4",
           "--access-sample", "1", "--vllm-arg=--max-model-len=2048")  # fmt: skip
CHANGE_EVERY_S = 30

console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seconds", type=float, help="end after so many seconds, and check every query (default: run until Ctrl-C)"
    )
    parser.add_argument("--replicas", type=int, default=1, help="vLLM engines")
    parser.add_argument("--record", type=Path, help="write the data of the panels to this JSON file, to draw them from")
    options = parser.parse_args()
    if not prometheus.is_installed():
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
    """The exit status: 1 if the queries were checked and one has no data."""
    shutil.rmtree(STATE, ignore_errors=True)
    BUILD.mkdir(parents=True, exist_ok=True)
    port = free_port()
    words = (*OPTIONS, "--replicas", str(replicas), "--metrics-port", str(port))
    with contextlib.ExitStack() as stack:
        console.print(f"Starting {replicas} vLLM engine(s) …")
        url = stack.enter_context(running_server([PIRATE, ZEPHYR], STATE, *words, log=BUILD / "server.log"))
        server = stack.enter_context(prometheus.running_prometheus([f"127.0.0.1:{port}"], BUILD / "prometheus"))
        overview = stack.enter_context(grafana.running_grafana(server.url, BUILD / "grafana"))
        console.print(f"Server: {url}/v1   Metrics: http://127.0.0.1:{port}/metrics   Logs: {STATE / 'logs'}")
        console.print(f"Prometheus: {server.url}/alerts")
        console.print(f"Grafana: {overview}" if overview else
                      f"Grafana is not installed here: import {grafana.DASHBOARDS}/*.json into yours.")  # fmt: skip
        began = time.monotonic()
        asyncio.run(under_load(url, seconds))
        if seconds is None:
            return 0
        took_s = time.monotonic() - began
        if record:
            record_panels(server, record, took_s)
        return report_queries(server, took_s)


async def under_load(url: str, seconds: float | None) -> None:
    models = ["zephyr", "pirate", demo.BASE_NAME, *MORE]
    asking = asyncio.create_task(load(url, models))
    changing = asyncio.create_task(change())
    await asyncio.wait({asking, changing}, timeout=seconds)
    for task in (asking, changing):
        task.cancel()
    await asyncio.gather(asking, changing, return_exceptions=True)


async def change() -> None:
    """Publish more adapters, then promote and roll back one name again and again, with a canary before each."""
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
    digest: str = next(revision["digest"] for revision in shown["revisions"] if revision["staged"])
    return digest[:12]


async def serve(*words: str | Path) -> str:
    """Run `python -m serve …` on this server. Returns its output."""
    command = [sys.executable, "-m", "serve", *map(str, words), "--state", str(STATE)]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, error = await process.communicate()
    if process.returncode:
        console.print(f"serve {words[0]}: {error.decode()}", markup=False)
    return output.decode()


def report_queries(server: prometheus.Prometheus, seconds: float) -> int:
    """Print which queries have no data. Returns the exit status."""
    empty = without_data(server, seconds)
    for query in empty:
        console.print(f"no data: {query}", markup=False)
    count = len(list(panel_queries()))
    console.print(f"{count - len(empty)} of {count} queries have data; firing: {sorted(server.firing()) or 'nothing'}")
    return bool(empty)


def record_panels(server: prometheus.Prometheus, record: Path, seconds: float) -> None:
    """Write the data of every panel to `record`, for deploy/dashboards/render."""
    data = {query.expression: server.query_range(query.expression, seconds, step_s=2) for query in panel_queries()}
    record.write_text(json.dumps(data))
    scraped = server.query("up")[0]["metric"]["instance"]
    with direct_client() as client:
        record.with_suffix(".prom").write_bytes(client.get(f"http://{scraped}/metrics").raise_for_status().content)


if __name__ == "__main__":
    main()
