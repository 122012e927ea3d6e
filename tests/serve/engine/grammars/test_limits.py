from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from itertools import product
from string import ascii_lowercase
from typing import Any

import pytest
import pytest_asyncio
import xgrammar

from serve.engine.grammars.limits import GrammarChecks, GrammarLimits, GrammarRefused, GrammarsBusy
from serve.engine.grammars.trials import LOST, Grammar, GrammarTrials

LIMITS = GrammarLimits(max_bytes=64 << 10, compile_s=1.5, step_s=0.25)
TOKENS = [
    *(bytes([byte]) for byte in range(256)),
    *("".join(letters).encode() for letters in product(ascii_lowercase, repeat=3)),
    b"</s>",
]


def vocabulary() -> str:
    info = xgrammar.TokenizerInfo(TOKENS, vocab_type=xgrammar.VocabType.RAW, stop_token_ids=[len(TOKENS) - 1])
    return info.serialize_json()


pytestmark = pytest.mark.asyncio(loop_scope="module")  # one process for all of them: it takes seconds to start


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def trials() -> AsyncIterator[GrammarTrials]:
    trials = GrammarTrials(vocabulary)
    yield trials
    process = await trials.start()
    trials.close()
    await process.wait()


def schema(**properties: Any) -> str:
    return json.dumps({"type": "object", "properties": properties, "required": [*properties]})


def choices(*texts: str) -> str:
    return "root ::= " + " | ".join(f'"{text}"' for text in texts)


TAG = {
    "structures": [{"begin": "<f>", "schema": {"type": "object"}, "end": "</f>"}],
    "triggers": ["<f>"],
}
FORMAT = {"type": "structural_tag", "format": {"type": "const_string", "value": "yes"}}
USUAL = [
    Grammar("json", schema(**{f"name_{index}": {"type": "string"} for index in range(100)})),
    Grammar("json", schema(code={"type": "string", "pattern": "^[A-Z]{2}[0-9]{4,10}$"}, list={"enum": ["a", "b"]})),
    Grammar("json", schema(count={"type": "integer", "minimum": -(10**18), "maximum": 10**18})),
    Grammar("json", json.dumps({"type": "array", "minItems": 10**5, "maxItems": 10**8, "items": {"type": "string"}})),
    Grammar("json", json.dumps({"$ref": "#"})),
    Grammar("regex", r"https?://[a-z0-9.-]+\.[a-z]{2,6}(/[^ ]*)?"),
    Grammar("regex", "([a-z]{1,300}){1,300}"),
    Grammar("regex", "((a+)+)+b"),
    Grammar("ebnf", choices(*(f"answer number {index}" for index in range(1000)))),
    Grammar("lark", 'start: "yes" | "no"'),
    Grammar("structural_tag", json.dumps(TAG)),
    Grammar("structural_tag", json.dumps(FORMAT)),
]
INVALID = [Grammar("regex", "("), Grammar("ebnf", "root ::= ("), Grammar("json", '{"type": 7}'), Grammar("json", "{")]
OPTIONAL = ".?" * 200
COSTLY = [
    Grammar("regex", ".*" * 2000),
    Grammar("regex", "abc" + OPTIONAL),
    Grammar("ebnf", choices(*("a" * 6000 + str(index) for index in range(10)))),
    Grammar("ebnf", "root ::= " + "[^a]? " * 400),
    Grammar("json", json.dumps({"type": "string", "pattern": OPTIONAL})),
    Grammar("structural_tag", json.dumps(FORMAT | {"format": {"type": "regex", "pattern": OPTIONAL}})),
]


@pytest.mark.parametrize("grammar", [*USUAL, *INVALID], ids=lambda grammar: f"{grammar.kind} {grammar.text[:30]}")
async def test_what_a_caller_usually_sends_goes_to_the_engine(trials: GrammarTrials, grammar: Grammar) -> None:
    """The engine also says what is wrong with an invalid grammar."""
    await GrammarChecks(LIMITS, trials).check(grammar)


@pytest.mark.parametrize("grammar", COSTLY, ids=lambda grammar: f"{grammar.kind} {grammar.text[:30]}")
async def test_a_grammar_that_costs_too_much_is_refused_however_it_is_written(
    trials: GrammarTrials, grammar: Grammar
) -> None:
    with pytest.raises(GrammarRefused, match=r"more than [\d.]+ s of CPU time .* Send a simpler one") as caught:
        await GrammarChecks(LIMITS, trials).check(grammar)

    assert caught.value.code == "grammar_too_costly"


async def test_one_that_costs_too_much_for_one_token_is_told_from_one_that_takes_long_to_compile(
    trials: GrammarTrials,
) -> None:
    grammar = Grammar("regex", ".?" * 60)

    with pytest.raises(GrammarRefused, match="max_grammar_step_s"):
        await GrammarChecks(GrammarLimits(1000, compile_s=60, step_s=0.02), trials).check(grammar)
    with pytest.raises(GrammarRefused, match="max_grammar_compile_s"):
        await GrammarChecks(GrammarLimits(1000, compile_s=0.01, step_s=60), trials).check(grammar)


@pytest.mark.parametrize("has_trials", [True, False], ids=["xgrammar", "another library"])
async def test_a_grammar_that_is_too_large_is_refused_with_both_sizes(trials: GrammarTrials, has_trials: bool) -> None:
    checks = GrammarChecks(GrammarLimits(100, 60, 60), trials if has_trials else None)

    await checks.check(Grammar("regex", "é" * 50))
    with pytest.raises(GrammarRefused, match="has 102 bytes; at most 100 are allowed") as caught:
        await checks.check(Grammar("regex", "é" * 51))

    assert caught.value.code == "grammar_too_large"


async def test_a_grammar_is_tried_once(trials: GrammarTrials) -> None:
    class Counting(GrammarTrials):
        count = 0

        async def run(self, grammar: Grammar, compile_s: float, step_s: float) -> str:
            self.count += 1
            return await trials.run(grammar, compile_s, step_s)

    counting = Counting(vocabulary)
    checks = GrammarChecks(LIMITS, counting)

    await asyncio.gather(*(checks.check(USUAL[0]) for _ in range(5)))
    await checks.check(USUAL[0])
    assert counting.count == 1

    for _ in range(2):
        with pytest.raises(GrammarRefused):
            await checks.check(COSTLY[1])
    assert counting.count <= 3  # the costly one first with little time, and once more with all of it


async def test_grammars_are_tried_again_after_the_process_was_lost(trials: GrammarTrials) -> None:
    checks = GrammarChecks(LIMITS, trials)
    (await trials.start()).kill()

    await checks.check(USUAL[0])  # the engine answers, whether or not the process was known to be lost by then

    with pytest.raises(GrammarRefused):
        await checks.check(COSTLY[1])


async def test_a_costly_grammar_does_not_keep_others_waiting(trials: GrammarTrials) -> None:
    checks = GrammarChecks(GrammarLimits(64 << 10, compile_s=10, step_s=0.25), trials)
    costly = [asyncio.ensure_future(checks.check(Grammar("regex", ".*" * 2000 + str(n)))) for n in range(3)]

    await checks.check(USUAL[0])

    assert not any(check.done() for check in costly)
    for check in costly:
        check.cancel()


class Trials(GrammarTrials):
    """Trials that take long until they are released."""

    def __init__(self) -> None:
        super().__init__(vocabulary)
        self.released = asyncio.Event()

    async def run(self, grammar: Grammar, compile_s: float, step_s: float) -> str:
        if compile_s == LIMITS.compile_s:
            await self.released.wait()
        return "compile" if grammar.text.startswith("slow") else "tried"


async def test_grammars_that_take_long_wait_in_a_short_queue_and_quick_ones_in_none() -> None:
    trials = Trials()
    checks = GrammarChecks(LIMITS, trials)
    waiting = [asyncio.create_task(checks.check(Grammar("regex", f"slow {number}"))) for number in range(4)]
    await asyncio.sleep(0.1)

    with pytest.raises(GrammarsBusy, match="try again"):
        await checks.check(Grammar("regex", "slow 5"))
    await checks.check(Grammar("regex", "quick"))

    trials.released.set()
    for result in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(result, GrammarRefused)
    with pytest.raises(GrammarRefused):
        await checks.check(Grammar("regex", "slow 5"))


async def test_a_trial_whose_verdict_is_lost_ends_and_the_next_one_has_a_new_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trials = GrammarTrials(vocabulary)
    process = await trials.start()
    assert await trials.run(Grammar("regex", "a"), 1.0, 0.25) == "tried"
    monkeypatch.setattr("serve.engine.grammars.trials._GRACE_S", 0.5)
    monkeypatch.setattr("serve.engine.grammars.trials._SLOWEST", 0.0)
    os.kill(process.pid, signal.SIGSTOP)
    assert await trials.run(Grammar("regex", "b"), 1.0, 0.25) == LOST
    await process.wait()

    monkeypatch.undo()
    assert await trials.run(Grammar("regex", "b"), 1.0, 0.25) == "tried"
    process = await trials.start()
    trials.close()
    await process.wait()
