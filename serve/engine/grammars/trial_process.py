"""Compiles grammars on trial. A script: GrammarTrials starts it, with nothing of Graft or vLLM imported.

It reads a line with the engine's vocabulary, as xgrammar writes it, and then a line of JSON for each trial. Every trial
is a fork, which has the vocabulary already and which the kernel ends when it has used its CPU time: no thread could be
stopped within xgrammar. The fork's parent, a fork too, writes `ID VERDICT` to standard output when it has ended. The
process ends with its standard input.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xgrammar

TRIED, COMPILE, STEP, MEMORY, CRASH = "tried", "compile", "step", "memory", "crash"

_OUT_OF_MEMORY_CODE = 3
_MEMORY_BYTES = 2 << 30  # that a trial may take
_THREADS = 8  # as vLLM; the limit of CPU time is that of all together
_STEPS = 32  # tokens that a trial generates
_NICE = 10  # the engine goes first
_VERDICTS = {
    0: TRIED,
    _OUT_OF_MEMORY_CODE: MEMORY,
    -signal.SIGPROF: COMPILE,
    -signal.SIGVTALRM: STEP,
}


def main() -> None:
    answers = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.nice(_NICE)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes that answer
    vocabulary = xgrammar.TokenizerInfo.deserialize_json(sys.stdin.buffer.readline().decode())
    for line in sys.stdin.buffer:
        if os.fork() == 0:
            _answer(answers, json.loads(line), vocabulary)
            os._exit(0)


def _answer(answers: int, trial: dict[str, Any], vocabulary: xgrammar.TokenizerInfo) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        pid = os.fork()
        if pid == 0:
            os._exit(_exit_code(trial, vocabulary))
        _, status = os.waitpid(pid, 0)
        verdict = _VERDICTS.get(os.waitstatus_to_exitcode(status), CRASH)
    except OSError:  # no further process can be made
        verdict = MEMORY
    os.write(answers, f"{trial['id']} {verdict}\n".encode())


def _exit_code(trial: dict[str, Any], vocabulary: xgrammar.TokenizerInfo) -> int:
    """Ends this process instead, with the signal of the limit that is passed."""
    _limit_memory()
    signal.setitimer(signal.ITIMER_PROF, trial["compile_s"])
    try:
        compiled = compile_grammar(trial["kind"], trial["text"], vocabulary)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _generate(compiled, vocabulary.vocab_size, trial["step_s"])
    except MemoryError:
        return _OUT_OF_MEMORY_CODE
    except Exception as error:  # what is wrong with a grammar is for vLLM to say
        return _OUT_OF_MEMORY_CODE if "bad_alloc" in str(error) else 0
    return 0


def _limit_memory() -> None:
    used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + _MEMORY_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def compile_grammar(kind: str, text: str, vocabulary: xgrammar.TokenizerInfo) -> Any:
    """As vLLM compiles it."""
    compiler = xgrammar.GrammarCompiler(vocabulary, max_threads=_THREADS, cache_enabled=False)
    if kind == "structural_tag":
        return _compile_structural_tag(compiler, text)
    compilers: dict[str, Callable[[str], Any]] = {
        "json": compiler.compile_json_schema,
        "regex": compiler.compile_regex,
        "lark": compiler.compile_lark,
        "ebnf": compiler.compile_grammar,
    }
    return compilers[kind](text)


def _compile_structural_tag(compiler: xgrammar.GrammarCompiler, text: str) -> Any:
    tag = json.loads(text)
    if "structures" not in tag:
        return compiler.compile_structural_tag(text)
    items = [
        xgrammar.StructuralTagItem(begin=part["begin"], schema=json.dumps(part["schema"]), end=part["end"])
        for part in tag["structures"]
    ]
    return compiler.compile_structural_tag(items, tag["triggers"])


def _generate(compiled: Any, vocabulary_size: int, step_s: float) -> None:
    """A random text of the grammar. The engine finds out before every token which ones are allowed, and everybody's
    next token waits for it."""
    matcher, mask = xgrammar.GrammarMatcher(compiled), xgrammar.allocate_token_bitmask(1, vocabulary_size)
    for _ in range(_STEPS):
        signal.setitimer(signal.ITIMER_VIRTUAL, step_s)
        matcher.fill_next_token_bitmask(mask, 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        allowed = np.flatnonzero(np.unpackbits(mask.numpy().view(np.uint8), bitorder="little")[:vocabulary_size])
        if not len(allowed):
            return
        signal.setitimer(signal.ITIMER_VIRTUAL, step_s)
        if not matcher.accept_token(int(random.choice(allowed))) or matcher.is_terminated():  # noqa: S311
            return


if __name__ == "__main__":
    main()
