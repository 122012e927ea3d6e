"""The process that compiles grammars on trial, from the side of the engine's process."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# A trial may wait for its process to start, and get a tenth of a processor: the engine goes first.
_GRACE_S, _SLOWEST = 60.0, 10.0

LOST = "lost"  # the process has ended, and knows nothing of the grammar

_SCRIPT = Path(__file__).with_name("trial_process.py")
# No threads and little memory beside what xgrammar itself takes.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Grammar:
    """`kind`: `json` (a schema), `regex`, `ebnf`, `lark` or `structural_tag`."""

    kind: str
    text: str


class GrammarTrials:
    """Starts the process with its first trial, and again if it has ended."""

    def __init__(self, vocabulary: Callable[[], str]) -> None:
        """`vocabulary`: xgrammar's description of the engine's tokens, as JSON in one line."""
        self._vocabulary = vocabulary
        self._process: asyncio.subprocess.Process | None = None
        self._starting = asyncio.Lock()
        self._ids = itertools.count()
        self._waiting: dict[str, asyncio.Future[str]] = {}  # for verdicts of this process
        self._reading: asyncio.Task[None] | None = None

    async def run(self, grammar: Grammar, compile_s: float, step_s: float) -> str:
        """The verdict: one of those of `trial_process`, or LOST. `compile_s`: CPU time to compile the grammar;
        `step_s`: CPU time for each token."""
        trial_id = str(next(self._ids))
        trial = {"id": trial_id, "kind": grammar.kind, "text": grammar.text}
        line = json.dumps(trial | {"compile_s": compile_s, "step_s": step_s}) + "\n"
        try:
            async with asyncio.timeout(_GRACE_S + _SLOWEST * compile_s):
                return await self._answer(trial_id, line.encode())
        except TimeoutError:
            # Its verdict was lost, as when the kernel ends a process for its memory. Nothing would wait for less.
            logger.warning("Warning: a grammar's trial did not end, and its process is started again.")
            self.close()
            return LOST
        except OSError as error:
            logger.warning("Warning: a grammar can't be compiled on trial: %r", error)
            self._process = None
            return LOST

    async def _answer(self, trial_id: str, line: bytes) -> str:
        """Raises OSError if the process has ended."""
        process = await self.start()
        assert process.stdin is not None
        waiting = self._waiting
        verdict: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        waiting[trial_id] = verdict
        try:
            process.stdin.write(line)
            await process.stdin.drain()
            return await verdict
        finally:
            del waiting[trial_id]

    async def start(self) -> asyncio.subprocess.Process:
        """The process, which takes seconds until it answers."""
        async with self._starting:
            if self._process is None or self._process.returncode is not None:
                self._process = process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-P", str(_SCRIPT)),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.DEVNULL,
                    env=os.environ | _ENVIRONMENT,
                    start_new_session=True,  # it ends with its input, and not by Ctrl-C before the engine does
                )
                assert process.stdin is not None
                process.stdin.write(self._vocabulary().encode() + b"\n")
                self._waiting = {}
                self._reading = asyncio.ensure_future(_read(process, self._waiting))
            return self._process

    def close(self) -> None:
        """Ends the process, and the trials that run. Returns at once."""
        if self._process is not None and self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)


async def _read(process: asyncio.subprocess.Process, waiting: dict[str, asyncio.Future[str]]) -> None:
    """Gives those who wait their verdicts, until the process ends."""
    assert process.stdout is not None
    while line := await process.stdout.readline():
        trial_id, _, verdict = line.decode().strip().partition(" ")
        if (future := waiting.get(trial_id)) and not future.done():
            future.set_result(verdict)
    code = await process.wait()
    lost = [future for future in waiting.values() if not future.done()]
    if lost:
        logger.warning("Warning: the process that compiles grammars on trial has ended (%d).", code)
    for future in lost:
        future.set_result(LOST)
