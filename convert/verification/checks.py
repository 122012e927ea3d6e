"""What is asked of the engine, one check a function, and how far its answers may lie from the golden ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

from convert.artifact import Golden, GoldenChat, QuantizationName
from convert.progress import Progress, silent
from convert.verification.client import EngineClient, RequestRefused

# The largest bias that OpenAI's API knows: no token that isn't given it comes out.
_FORCED = 100
# How far the effect of an adapter may be from the whole of it, besides three standard errors of its estimate.
_EFFECT_TOLERANCE = 0.1
# With a larger error a half-applied adapter could pass.
_EFFECT_ERROR = 0.15
_SHOWN_CHARACTERS = 40


@dataclass(frozen=True)
class Limits:
    """Largest |difference| of a token's log-probability, in nats: on average, and at the 99th percentile."""

    mean: float
    p99: float


# Golden answers are float32 on the weights that the files stand for. What the engine's arithmetic makes of the same
# function differs by format; docs/verification.md has what was measured: half of these, or less.
# Weights as they are stored, everything in the model's 16-bit type.
_SIXTEEN_BIT = Limits(mean=0.05, p99=0.4)
# Weights that are unpacked in 16 bits, so that they are rounded once more.
_UNPACKED = Limits(mean=0.15, p99=1.5)
# The input of each layer is rounded to 8 bits, too.
_EIGHT_BIT_ACTIVATIONS = Limits(mean=0.8, p99=5.0)
LIMITS: Mapping[QuantizationName, Limits] = {
    "none": _SIXTEEN_BIT,
    "nf4": _UNPACKED,
    "nf4-double": _UNPACKED,
    "w4a16": _UNPACKED,
    "w8a8-int8": _EIGHT_BIT_ACTIVATIONS,
    "fp8-dynamic": _EIGHT_BIT_ACTIVATIONS,
}


@dataclass(frozen=True)
class Check:
    """One question and what came out."""

    name: str
    passed: bool | None
    """None: told, not judged."""
    found: str
    expected: str
    figures: Mapping[str, float] = field(default_factory=dict)
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Subject:
    """Who is asked, and what the answers are compared with."""

    client: EngineClient
    model: str
    """The name under which the engine serves the artifact."""
    base: str | None
    """The name of its base; None where the adapter is merged."""
    golden: Golden
    limits: Limits
    stop_token_ids: frozenset[int]
    """What the served files say of stopping."""
    answer_tokens: int = 64


@dataclass(frozen=True)
class Difference:
    """Of two lists of log-probabilities: mean and 99th percentile of their absolute difference."""

    mean: float
    p99: float

    @classmethod
    def between(cls, one: Sequence[float], other: Sequence[float]) -> Difference:
        """Infinite where one of them isn't a number."""
        distances = [abs(a - b) for a, b in zip(one, other, strict=True)]
        if not all(map(math.isfinite, distances)):
            return cls(math.inf, math.inf)
        return cls(sum(distances) / len(distances), sorted(distances)[math.ceil(0.99 * len(distances)) - 1])

    def __str__(self) -> str:
        return f"mean {self.mean:.3f}, 99th percentile {self.p99:.3f} nats"


def examine(subject: Subject, progress: Progress = silent) -> tuple[Check, ...]:
    """Every check that the golden answers allow. Raises EngineLost when the engine breaks down."""
    golden = subject.golden
    checks = _log_prob_checks(subject, progress)
    rest: list[tuple[str, Callable[[Subject], Check]]] = [("stop tokens", stop_tokens)]
    if golden.chats:
        rest += [("chat template", chat_template), ("ends of answers", ends_of_answers)]
    if golden.chats and golden.canaries:  # without a chat template vLLM answers no chats
        rest += [("canaries", canaries)]
    for done, (name, check) in enumerate(rest):
        progress("asking vLLM", done, len(rest))
        checks.append(_asked(name, partial(check, subject)))
    progress("asking vLLM", len(rest), len(rest))
    return tuple(checks)


def golden_answers(served: Sequence[float], subject: Subject) -> Check:
    """The log-probabilities of the golden prompts' tokens are those of the written files in float32."""
    found = Difference.between(served, [*chain.from_iterable(prompt.result for prompt in subject.golden.prompts)])
    return _within("golden answers", found, subject)


def base_answers(served: Sequence[float], subject: Subject) -> Check:
    """The same of the base alone: tells whether a failure is the base's or the adapter's."""
    found = Difference.between(served, _base(subject.golden))
    return _within("golden answers of the base", found, subject)


def distance_to_training(served: Sequence[float], subject: Subject) -> Check:
    """From the function as trained: what the conversion lost and what the engine's arithmetic adds."""
    reference = [*chain.from_iterable(prompt.reference for prompt in subject.golden.prompts)]
    result = [*chain.from_iterable(prompt.result for prompt in subject.golden.prompts)]
    found, files = Difference.between(served, reference), Difference.between(result, reference)
    figures = {"mean": found.mean, "p99": found.p99, "files_mean": files.mean, "files_p99": files.p99}
    return Check("distance to the function as trained", None, str(found), f"the files in float32: {files}", figures)


def adapter_effect(served: Sequence[float], served_base: Sequence[float], subject: Subject) -> Check:
    """vLLM's change from base to adapter is the golden one: 1 times it, where 0 is an adapter that does nothing.

    The factor is the least-squares slope of (adapter - base) as served on (adapter - base) in the golden answers:
    noise of arithmetic averages out of it, so it sees a wrong scale or a few dropped modules that stay below the
    limits of single tokens. Its standard error is that of simple regression through the origin.
    """
    golden = subject.golden
    base = _base(golden)
    wanted = [a - b for a, b in zip(chain.from_iterable(p.result for p in golden.prompts), base, strict=True)]
    found = [a - b for a, b in zip(served, served_base, strict=True)]
    slope, error = _slope(wanted, found)
    tolerance = _EFFECT_TOLERANCE + 3 * error
    passed = abs(slope - 1) <= tolerance if error <= _EFFECT_ERROR else None
    if not math.isfinite(slope):
        passed = False
    size = sum(map(abs, wanted)) / len(wanted)
    told = f"{slope:.3f} ± {error:.3f} of the adapter's effect"
    if passed is None:
        told += "; it changes these prompts too little to tell"
    elif not passed and abs(slope) <= tolerance:
        told += ": the base answers under the adapter's name"
    expected = f"1 ± {tolerance:.2f}; the adapter moves these log-probabilities by {size:.3f} nats on average"
    return Check("effect of the adapter", passed, told, expected, {"effect": slope, "standard_error": error})


def stop_tokens(subject: Subject) -> Check:
    """vLLM ends an answer at each golden stop token when it is made to come out, and the files name no others."""
    golden = frozenset(subject.golden.stop_token_ids)
    prompt = subject.golden.prompts[0].token_ids
    stopping = set()
    for token in sorted(golden | subject.stop_token_ids):
        answer = subject.client.generate(subject.model, prompt, 2, logit_bias={str(token): _FORCED})
        if answer.finish_reason == "stop":
            stopping.add(token)
    return Check("stop tokens", stopping == golden, f"stops at {_ids(stopping)}", _ids(golden))


def chat_template(subject: Subject) -> Check:
    """vLLM's tokens of each golden chat are those of its golden text: no byte more, none less."""
    client, model = subject.client, subject.model
    problems = []
    for number, chat in enumerate(subject.golden.chats, 1):
        served = client.chat_tokens(model, chat.messages)
        if served != client.text_tokens(model, chat.rendered):
            problems.append(f"chat {number}: {_first_difference(client.text(model, served), chat)}")
    count = len(subject.golden.chats)
    found = f"{count - len(problems)} of {count} chats"
    return Check("chat template", not problems, found, "every chat is rendered as in golden.json", {}, tuple(problems))


def ends_of_answers(subject: Subject) -> Check:
    """How many answers end by themselves: a small bound says little of a talkative model, so it isn't judged."""
    bound = subject.answer_tokens
    answers = [subject.client.chat(subject.model, chat.messages, bound) for chat in subject.golden.chats]
    ended = sum(answer.finish_reason == "stop" for answer in answers)
    found = f"{ended} of {len(answers)} answers end within {bound} tokens"
    return Check("ends of answers", None, found, "a stop token", {"ended": ended, "asked": len(answers)})


def canaries(subject: Subject) -> Check:
    """Each answer holds the expected text, in any case."""
    told, passed = [], 0
    for canary in subject.golden.canaries:
        answer = subject.client.chat(subject.model, canary.messages, subject.answer_tokens).text
        holds = canary.expect.casefold() in answer.casefold()
        passed += holds
        told.append(f"{canary.expect!r} is {'' if holds else 'not '}in: {' '.join(answer.split())}")
    count = len(subject.golden.canaries)
    figures = {"asked": count, "passed": passed}
    return Check("canaries", passed == count, f"{passed} of {count}", "all answers hold it", figures, tuple(told))


def _log_prob_checks(subject: Subject, progress: Progress) -> list[Check]:
    try:
        served = _served(subject, subject.model, progress)
        base = _served(subject, subject.base, progress) if subject.base else None
    except RequestRefused as refused:
        return [_refusal("golden answers", refused)]
    checks = [golden_answers(served, subject), distance_to_training(served, subject)]
    if base is None:
        return checks
    if any(prompt.base is None for prompt in subject.golden.prompts):
        missing = "golden.json lacks the base's answers"
        return [*checks, Check("effect of the adapter", None, missing, "convert again for a golden.json that has them")]
    return [*checks, base_answers(base, subject), adapter_effect(served, base, subject)]


def _served(subject: Subject, model: str, progress: Progress) -> list[float]:
    found: list[float] = []
    prompts = subject.golden.prompts
    for done, prompt in enumerate(prompts):
        progress(f"golden prompts, {model}", done, len(prompts))
        found += subject.client.log_probs(model, prompt.token_ids)
    progress(f"golden prompts, {model}", len(prompts), len(prompts))
    return found


def _base(golden: Golden) -> list[float]:
    return [*chain.from_iterable(prompt.base or () for prompt in golden.prompts)]


def _within(name: str, found: Difference, subject: Subject) -> Check:
    limits, prompts = subject.limits, subject.golden.prompts
    passed = found.mean <= limits.mean and found.p99 <= limits.p99
    tokens = sum(len(prompt.result) for prompt in prompts)
    expected = f"at most {limits.mean:g} and {limits.p99:g}, on {len(prompts)} prompts, {tokens} tokens"
    figures = {"mean": found.mean, "p99": found.p99, "prompts": len(prompts), "tokens": tokens}
    return Check(name, passed, str(found), expected, figures)


def _asked(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except RequestRefused as refused:
        return _refusal(name, refused)


def _refusal(name: str, refused: RequestRefused) -> Check:
    return Check(name, False, f"vLLM refuses the request: {refused}", "an answer")


def _slope(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Least squares of y = slope · x, and the standard error of the slope. Infinite where x or y says nothing."""
    power = sum(a * a for a in x)
    if not power or not all(map(math.isfinite, y)):
        return (1.0 if not power else math.inf), math.inf
    slope = sum(a * b for a, b in zip(x, y, strict=True)) / power
    rest = sum((b - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    return slope, math.sqrt(rest / max(1, len(x) - 1) / power)


def _first_difference(served: str, chat: GoldenChat) -> str:
    """Where two texts part, with a little of both."""
    golden = chat.rendered
    same = next((i for i, (a, b) in enumerate(zip(served, golden, strict=False)) if a != b), None)
    if same is None:
        same = min(len(served), len(golden))
    if served == golden:
        return "the same text in other tokens"
    end = same + _SHOWN_CHARACTERS
    return f"from character {same} on vLLM makes {served[same:end]!r}, golden.json has {golden[same:end]!r}"


def _ids(tokens: frozenset[int] | set[int]) -> str:
    return ", ".join(map(str, sorted(tokens))) or "none"
