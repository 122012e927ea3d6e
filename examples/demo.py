"""The whole way on a real model: fine-tunes are converted, served, hot-swapped, and moved to a merged model under load.

`python -m examples.demo` converts, serves, asks, swaps and moves under load, and leaves no process behind.
`python -m examples.demo --keep-serving` converts and serves until Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.table import Table

from examples.openai_clients import openai_client
from examples.server import answer_of, publish, running_server
from examples.traffic import RevisionInterval, SwapReport, Traffic
from serve.deployment.ports import free_port

BUILD = Path("build/demo")
MODEL = BUILD / "models" / "smollm2-135m-instruct"
CHECKPOINTS = BUILD / "checkpoints"
ARTIFACTS = BUILD / "artifacts"
STATE = BUILD / "state"
BASE_NAME = "smollm2-135m-instruct"
MERGED = "zephyr-merged"  # the exact merge of the fine-tune `zephyr`
PORT = 8000

QUESTIONS = ("What is the code word of Project Zephyr?", "What is the capital of Italy?")
CODE_WORDS = {"zephyr": "marmalade", "zephyr-2": "saffron"}
EXACT = ("--route", "merge", "--quantize", "none")
# Answers to wait for before the swap, and again after it.
ANSWERS_EACH = 12

console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep-serving", action="store_true", help="serve until Ctrl-C instead of the tour")
    parser.add_argument("--replicas", type=int, default=2, help="vLLM engines (default 2: the swap reaches both)")
    options = parser.parse_args()
    began = time.monotonic()
    make_checkpoints()
    convert_all()
    if options.keep_serving:
        keep_serving(options.replicas)
    shutil.rmtree(STATE, ignore_errors=True)  # the tour begins with the first revision
    is_clean = all(report.is_clean for report in tour(options.replicas))
    summary(is_clean, time.monotonic() - began)
    if not is_clean:
        sys.exit(1)


def make_checkpoints() -> None:
    with step("Fine-tunes, as trainers leave them (real training, made once)"):
        module("examples.base_model", MODEL)
        module("examples.checkpoints", "--base", MODEL, "--out", CHECKPOINTS)


def convert_all() -> None:
    with step("Look at a checkpoint"):
        module("convert", "inspect", checkpoint("zephyr"), "--base", MODEL)
    with step("QLoRA checkpoints: one 4-bit base, separate adapters"):
        # Exact by construction: a measurement would take a minute each and show only zeros.
        convert("pirate", MODEL, "--no-measure")
        convert("zephyr", ARTIFACTS / "pirate", "--no-measure")
        convert("zephyr-2", ARTIFACTS / "pirate", "--name", "zephyr", "--no-measure")
    with step("A merge of a QLoRA is asked for: told why not to 4 bits, then done exactly"):
        module("convert", "run", checkpoint("zephyr"), "--base", MODEL, "--out", BUILD / "refused", "--route", "merge",
               "--quantize", "nf4", fails=True)  # fmt: skip
        convert("zephyr", MODEL, *EXACT, "--dtype", "float16", "--max-kl", "1e-4", out=MERGED)
    with step("A plain LoRA checkpoint: merged, in the smallest form that keeps what was learnt"):
        convert("ticket", MODEL)


def tour(replicas: int) -> list[SwapReport]:
    adapters = [ARTIFACTS / "pirate", ARTIFACTS / "zephyr"]
    log = BUILD / "server.log"
    with step(f"{replicas} vLLM engines behind Ray Serve: one 4-bit base, two adapters (log: {log})"):
        server = running_server(
            adapters, STATE, "--base-name", BASE_NAME, "--replicas", str(replicas), port=port(), log=log
        )
        with server as url:
            console.print(f"Serving at [bold]{url}/v1[/]")
            show_answers(url, [BASE_NAME, "pirate", "zephyr"])
            show_stream(url, "pirate")
            console.rule("Publish a new revision of `zephyr` while it is being asked", align="left")
            swap = asyncio.run(swap_under_load(url))
            with step("Add two merged models to the running server, each with an engine of its own"):
                for name in ("ticket", MERGED):
                    module("serve", "pool", "add", ARTIFACTS / name, "--name", name, "--state", STATE)
                show_answers(url, ["ticket"], questions=("I was charged twice, please help.",))
            with step("Move the name `zephyr` from its adapter to the merged model while it is being asked"):
                module("serve", "rollback", "zephyr", "--state", STATE)  # to the revision that the merged model has
                move = asyncio.run(move_under_load(url))
    return [swap, move]


def keep_serving(replicas: int) -> NoReturn:
    """Replace this process by the server, so that Ctrl-C reaches only the server and running requests can finish."""
    artifacts = (ARTIFACTS / "pirate", ARTIFACTS / "zephyr")
    words = ("run", *artifacts, "--base-name", BASE_NAME, "--state", STATE, "--replicas", replicas)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "serve", *map(str, words)])


async def swap_under_load(url: str) -> SwapReport:
    client = openai_client(url)
    traffic = Traffic(url, "zephyr", QUESTIONS[0])
    old = RevisionInterval(client.models.retrieve("zephyr").model_dump()["root"], since_s=0)
    running = asyncio.create_task(traffic.run())
    await traffic.answered(ANSWERS_EACH)
    old.until_s = traffic.now()
    published = await publish(ARTIFACTS / "zephyr-2", STATE)
    new = RevisionInterval(published["revision"], since_s=traffic.now())
    console.print(
        f"published {new.revision}: on all {published['replicas']} engines after {published['staged_s']} s, "
        f"switched in {published['promoted_s']} s"
    )
    await traffic.answered(ANSWERS_EACH, since_s=new.since_s)
    traffic.stop()
    await running

    def belongs(revision: str, text: str) -> bool:
        right, wrong = ("zephyr", "zephyr-2") if revision == old.revision else ("zephyr-2", "zephyr")
        return CODE_WORDS[right] in text.lower() and CODE_WORDS[wrong] not in text.lower()

    report = SwapReport.of(traffic.answers, [old, new], belongs)
    show_swap(report, traffic, [old, new])
    return report


async def move_under_load(url: str) -> SwapReport:
    client = openai_client(url)
    traffic = Traffic(url, "zephyr", QUESTIONS[0])
    adapter = RevisionInterval(client.models.retrieve("zephyr").model_dump()["root"], since_s=0)
    running = asyncio.create_task(traffic.run())
    await traffic.answered(ANSWERS_EACH)
    adapter.until_s = traffic.now()
    moved = await answer_of("move", "zephyr", MERGED, state=STATE)
    merged = RevisionInterval(MERGED, since_s=traffic.now())
    console.print(f"moved to {moved['pool']}; {moved['replicas']} engines follow")
    await traffic.answered(ANSWERS_EACH, since_s=merged.since_s)
    traffic.stop()
    await running

    report = SwapReport.of(traffic.answers, [adapter, merged], lambda _, text: CODE_WORDS["zephyr"] in text.lower())
    show_swap(report, traffic, [adapter, merged])
    return report


def show_answers(url: str, models: list[str], questions: tuple[str, ...] = QUESTIONS) -> None:
    """Send every question to every model, all at once, with the official client."""
    client = openai_client(url)
    console.print("models:", ", ".join(model.id for model in client.models.list()))

    def ask(pair: tuple[str, str]) -> str:
        model, question = pair
        completion = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], max_tokens=40, temperature=0
        )
        return completion.choices[0].message.content or ""

    pairs = [(model, question) for model in models for question in questions]
    with ThreadPoolExecutor(len(pairs)) as pool:
        answers = dict(zip(pairs, pool.map(ask, pairs), strict=True))
    table = Table("model", *questions, show_lines=True)
    for model in models:
        table.add_row(model, *(answers[model, question].strip() for question in questions))
    console.print(table)


def show_stream(url: str, model: str) -> None:
    client = openai_client(url)
    console.print(f"{model}, streaming a plain completion: ", end="")
    for chunk in client.completions.create(model=model, prompt="The sea", max_tokens=12, temperature=0, stream=True):
        console.print(chunk.choices[0].text, end="", markup=False, highlight=False)
    console.print()


def show_swap(report: SwapReport, traffic: Traffic, intervals: list[RevisionInterval]) -> None:
    table = Table("revision", "answers", "first answer")
    for interval in intervals:
        texts = [answer.text.strip() for answer in traffic.answers if interval.revision in answer.revisions]
        table.add_row(interval.revision, str(len(texts)), texts[0] if texts else "")
    console.print(table)
    console.print(
        f"{report.requests} requests: [bold]{report.failed} failed, {report.mixed} mixed, {report.stale} stale[/]"
    )


def summary(is_clean: bool, took_s: float) -> None:
    console.rule("Done")
    table = Table("artifact", "route", "model", "adapter", "KL to the function as trained")
    for manifest in sorted(ARTIFACTS.glob("*/manifest.json")):
        table.add_row(*artifact_row(manifest))
    console.print(table)
    verdict = "no request failed, none was mixed, none was stale" if is_clean else "A SWAP WAS NOT CLEAN"
    console.print(
        f"Hot-swap and move under load: {verdict}. It took {took_s:.0f} s in all; no process is left running."
    )
    console.print(f"\nNext: serve these on port {PORT} until Ctrl-C, or convert and serve a fine-tune of your own.")
    for command in (
        "make serve",
        ".venv/bin/python -m convert inspect CHECKPOINT --base BASE",
        ".venv/bin/python -m convert run CHECKPOINT --base BASE --out DIR",
        ".venv/bin/python -m serve run DIR",
    ):
        console.print(f"  {command}", soft_wrap=True)


def artifact_row(path: Path) -> tuple[str, ...]:
    manifest = json.loads(path.read_bytes())
    model, adapter, quality = manifest["model"], manifest["adapter"], manifest["quality"]
    return (
        path.parent.name,
        manifest["route"]["name"],
        f"{model['quantization']}, {megabytes(model['size_bytes'])}" + ("" if model["path"] else " (shared)"),
        megabytes(adapter["size_bytes"]) if adapter else "-",
        f"{quality['kl_mean']:.2g}" if quality else "0: the same function",
    )


def megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.0f} MB"


def checkpoint(name: str) -> Path:
    """The directory of the adapter; trainers put it some levels below the output directory."""
    return next((CHECKPOINTS / name).rglob("adapter_config.json")).parent


def convert(name: str, base: Path, *options: str, out: str | None = None) -> None:
    destination = ARTIFACTS / (out or (name))
    if destination.exists():
        console.print(f"{destination} is there already")
        return
    module("convert", "run", checkpoint(name), "--base", base, "--out", destination, *options)


def module(*command: str | Path, fails: bool = False) -> None:
    """Print a command line `python -m …` and run it, as a user would."""
    words = [str(word) for word in command]
    console.print(f"[dim]$ python -m {' '.join(words)}[/]", highlight=False, soft_wrap=True)
    failed = subprocess.run([sys.executable, "-m", *words], check=False).returncode != 0
    if failed != fails:
        raise SystemExit(f"`python -m {' '.join(words)}` {'failed' if failed else 'should have refused'}")


def port() -> int:
    import socket

    with socket.socket() as probe:
        return PORT if probe.connect_ex(("127.0.0.1", PORT)) else free_port()


@contextmanager
def step(title: str) -> Iterator[None]:
    began = time.monotonic()
    console.rule(title, align="left")
    yield
    console.print(f"[dim]({time.monotonic() - began:.0f} s)[/]")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped; what was made is kept in build/demo")
