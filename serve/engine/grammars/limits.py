"""Refuses grammars that would cost the engine too much, whatever makes them so: what a grammar costs can't be told from
its text. 60 characters of a regex may compile for a minute, and 200 kB of choices for a second."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections import OrderedDict
from dataclasses import dataclass

from serve.engine.grammars.trials import LOST, Grammar, GrammarTrials
from serve.settings import EngineSettings

# Most grammars take less CPU time than this. They never wait for the others, which are tried one at a time.
_QUICK_S = 0.5
_MAX_REMEMBERED = 4096
# Each may take `max_grammar_compile_s`, and its request has a place in the engine meanwhile.
_MAX_SLOW_WAITING = 4
_TRIED, _STEP, _COMPILE, _BUSY = "tried", "step", "compile", "busy"

TOO_LARGE, TOO_COSTLY = "grammar_too_large", "grammar_too_costly"


class GrammarRefused(Exception):
    """`code` is that of the answer."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class GrammarsBusy(Exception):
    """Too many grammars are being tried that take long to compile: a later attempt can succeed."""

    def __init__(self) -> None:
        super().__init__("The engine compiles too many costly schemas, grammars or regexes at the moment; try again.")


@dataclass(frozen=True)
class GrammarLimits:
    """Of one grammar. `step_s`: CPU time to find the tokens that are allowed next."""

    max_bytes: int
    compile_s: float
    step_s: float

    @classmethod
    def of(cls, settings: EngineSettings) -> GrammarLimits:
        return cls(settings.max_grammar_bytes, settings.max_grammar_compile_s, settings.max_grammar_step_s)


class GrammarChecks:
    """Remembers the verdicts of the grammars that were used last."""

    def __init__(self, limits: GrammarLimits, trials: GrammarTrials | None) -> None:
        """`trials`: None where the engine compiles grammars with another library than xgrammar; then only their size is
        checked."""
        self._limits = limits
        self._trials = trials
        self._quick = asyncio.Semaphore(max(1, (os.cpu_count() or 1) // 2))
        self._slow = asyncio.Semaphore(1)
        self._slow_waiting = 0
        self._verdicts: OrderedDict[bytes, asyncio.Task[str]] = OrderedDict()

    async def check(self, grammar: Grammar) -> None:
        """Raises GrammarRefused or GrammarsBusy."""
        if (size := len(grammar.text.encode(errors="surrogatepass"))) > self._limits.max_bytes:
            raise GrammarRefused(
                TOO_LARGE,
                f"The schema, grammar, regex or list of choices of this request has {size} bytes; at most "
                f"{self._limits.max_bytes} are allowed here (max_grammar_bytes). Send a smaller one.",
            )
        if self._trials is not None and (verdict := await self._verdict(grammar, self._trials)) != _TRIED:
            raise GrammarRefused(TOO_COSTLY, f"{self._reason(verdict)} Send a simpler one.")

    def _reason(self, verdict: str) -> str:
        subject = "The schema, grammar, regex or list of choices of this request"
        if verdict == _COMPILE:
            return (
                f"{subject} takes more than {self._limits.compile_s:g} s of CPU time to compile, which is the limit "
                "here (max_grammar_compile_s): it has too many parts that can match the same text, such as `.*.*.*`, "
                "or too many strings with a `maxLength`."
            )
        if verdict == _STEP:
            return (
                f"{subject} takes more than {self._limits.step_s:g} s of CPU time for one token, which is the limit "
                "here (max_grammar_step_s): it has too many optional parts in a row, such as `.?.?.?`."
            )
        return f"{subject} can't be compiled: it takes too much memory, or is nested too deeply."

    async def _verdict(self, grammar: Grammar, trials: GrammarTrials) -> str:
        key = hashlib.sha256(f"{grammar.kind}:{grammar.text}".encode(errors="surrogatepass")).digest()
        trial = self._verdicts.get(key)
        if trial is None:
            trial = self._verdicts[key] = asyncio.ensure_future(self._try(grammar, trials))
            if len(self._verdicts) > _MAX_REMEMBERED:
                self._verdicts.popitem(last=False)
        self._verdicts.move_to_end(key)
        verdict = await asyncio.shield(trial)  # others may wait for it, if this request is cancelled
        if verdict in (LOST, _BUSY) and self._verdicts.get(key) is trial:
            del self._verdicts[key]
        if verdict == _BUSY:
            raise GrammarsBusy
        return _TRIED if verdict == LOST else verdict  # the engine would serve nobody's grammar otherwise

    async def _try(self, grammar: Grammar, trials: GrammarTrials) -> str:
        limits = self._limits
        async with self._quick:
            verdict = await trials.run(grammar, min(_QUICK_S, limits.compile_s), limits.step_s)
        if verdict != _COMPILE or limits.compile_s <= _QUICK_S:
            return verdict
        if self._slow_waiting >= _MAX_SLOW_WAITING:
            return _BUSY
        self._slow_waiting += 1
        try:
            async with self._slow:
                return await trials.run(grammar, limits.compile_s, limits.step_s)
        finally:
            self._slow_waiting -= 1
