"""The checks of a served artifact, a function for each, and the limits on the difference from the golden answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

from convert.artifact import Golden, GoldenChat, QuantizationName
from convert.progress import Progress, silent
from convert.verification.client import EngineClient, RequestRefused

# The largest logit bias that OpenAI's API allows: a token that has it is always chosen.
_FORCED = 100
# How much of an adapter's effect may be missing, besides three standard errors of the estimate.
_EFFECT_TOLERANCE = 0.1
# With a larger standard error, an adapter that is applied at half its strength could pass.
_EFFECT_ERROR = 0.15
_SHOWN_CHARACTERS = 40


@dataclass(frozen=True)
class Limits:
    """Largest |difference| of a token's log-probability, in nats: on average, and at the 99th percentile."""

    mean: float
    p99: float


# Golden answers are computed in float32 from the written weights. The engine's arithmetic differs from that by format;
# docs/explanation/verification.md has the measured differences, which are at most half of these limits.
# The engine computes with the stored weights, in the model's 16-bit type.
_SIXTEEN_BIT = Limits(mean=0.05, p99=0.4)
# The engine dequantizes weights to 16 bits, which rounds them once more.
_UNPACKED = Limits(mean=0.15, p99=1.5)
# The engine rounds the input of each layer to 8 bits, too.
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
    """One check and its result."""

    name: str
    passed: bool | None
    """None: reported, but neither passed nor failed."""
    found: str
    expected: str
    figures: Mapping[str, float] = field(default_factory=dict)
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Subject:
    """The served artifact, and what its answers are compared with."""

    client: EngineClient
    model: str
    """The name under which the engine serves the artifact."""
    base: str | None
    """The name of its base; None where the adapter is merged."""
    golden: Golden
    limits: Limits
    stop_token_ids: frozenset[int]
    """The stop tokens in the served files."""
    answer_tokens: int = 64


@dataclass(frozen=True)
class Difference:
    """Mean and 99th percentile of the absolute difference of two lists of log-probabilities."""

    mean: float
    p99: float

    @classmethod
    def between(cls, first: Sequence[float], second: Sequence[float]) -> Difference:
        """Infinite if any value is NaN or infinite."""
        distances = [abs(a - b) for a, b in zip(first, second, strict=True)]
        if not all(map(math.isfinite, distances)):
            return cls(math.inf, math.inf)
        return cls(sum(distances) / len(distances), sorted(distances)[math.ceil(0.99 * len(distances)) - 1])

    def __str__(self) -> str:
        return f"mean {self.mean:.3f}, 99th percentile {self.p99:.3f} nats"


def examine(subject: Subject, progress: Progress = silent) -> tuple[Check, ...]:
    """Every check that the golden answers allow. Raises EngineLost when the engine fails."""
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
    result = [*chain.from_iterable(prompt.result for prompt in subject.golden.prompts)]
    return _within("golden answers", Difference.between(served, result), subject)


def base_answers(served: Sequence[float], subject: Subject) -> Check:
    """The same check for the base alone, to show whether a failure comes from the base or from the adapter."""
    return _within("golden answers of the base", Difference.between(served, _base(subject.golden)), subject)


def distance_to_training(served: Sequence[float], subject: Subject) -> Check:
    """The difference from the function as trained: the loss of the conversion and of the engine's arithmetic."""
    reference = [*chain.from_iterable(prompt.reference for prompt in subject.golden.prompts)]
    result = [*chain.from_iterable(prompt.result for prompt in subject.golden.prompts)]
    engine, files = Difference.between(served, reference), Difference.between(result, reference)
    figures = {"mean": engine.mean, "p99": engine.p99, "files_mean": files.mean, "files_p99": files.p99}
    return Check("distance to the function as trained", None, str(engine), f"the files in float32: {files}", figures)


def adapter_effect(served: Sequence[float], served_base: Sequence[float], subject: Subject) -> Check:
    """The served adapter has the effect that it has in the golden answers: a factor of 1. A factor of 0 is no effect.

    The factor is the least-squares slope of (adapter - base) as served over (adapter - base) in the golden answers. The
    noise of arithmetic averages out in it, so it shows a wrong scale or a few missing modules that the limits of single
    tokens don't show. Its standard error is that of simple linear regression through the origin.
    """
    golden = subject.golden
    base = _base(golden)
    golden_change = [a - b for a, b in zip(chain.from_iterable(p.result for p in golden.prompts), base, strict=True)]
    served_change = [a - b for a, b in zip(served, served_base, strict=True)]
    slope, error = _slope(golden_change, served_change)
    tolerance = _EFFECT_TOLERANCE + 3 * error
    passed = _effect_passed(slope, error, tolerance)
    estimate = f"{slope:.3f} ± {error:.3f} of the adapter's effect"
    if passed is None:
        estimate += "; the adapter changes these prompts too little to tell"
    elif not passed and abs(slope) <= tolerance:
        estimate += ": the base answers under the adapter's name"
    size = sum(map(abs, golden_change)) / len(golden_change)
    expected = f"1 ± {tolerance:.2f}; the adapter moves these log-probabilities by {size:.3f} nats on average"
    return Check("effect of the adapter", passed, estimate, expected, {"effect": slope, "standard_error": error})


def _effect_passed(slope: float, error: float, tolerance: float) -> bool | None:
    """None where the estimate is too uncertain."""
    if not math.isfinite(slope):
        return False
    return abs(slope - 1) <= tolerance if error <= _EFFECT_ERROR else None


def stop_tokens(subject: Subject) -> Check:
    """vLLM ends an answer at each golden stop token when that token is forced, and the files have no others."""
    golden = frozenset(subject.golden.stop_token_ids)
    prompt = subject.golden.prompts[0].token_ids
    stopping = set()
    for token in sorted(golden | subject.stop_token_ids):
        answer = subject.client.generate(subject.model, prompt, 2, logit_bias={str(token): _FORCED})
        if answer.finish_reason == "stop":
            stopping.add(token)
    return Check("stop tokens", stopping == golden, f"stops at {_ids(stopping)}", _ids(golden))


def chat_template(subject: Subject) -> Check:
    """vLLM's tokens of each golden chat are exactly those of its golden text."""
    client, model = subject.client, subject.model
    problems = []
    for number, chat in enumerate(subject.golden.chats, 1):
        served = client.chat_tokens(model, chat.messages)
        if served != client.text_tokens(model, chat.rendered):
            problems.append(f"chat {number}: {_first_difference(client.text(model, served), chat)}")
    count = len(subject.golden.chats)
    equal = f"{count - len(problems)} of {count} chats"
    return Check("chat template", not problems, equal, "every chat is rendered as in golden.json", {}, tuple(problems))


def ends_of_answers(subject: Subject) -> Check:
    """How many answers end with a stop token. It is only reported: a model may give longer answers than the bound."""
    bound = subject.answer_tokens
    answers = [subject.client.chat(subject.model, chat.messages, bound) for chat in subject.golden.chats]
    ended = sum(answer.finish_reason == "stop" for answer in answers)
    share = f"{ended} of {len(answers)} answers end within {bound} tokens"
    return Check("ends of answers", None, share, "a stop token", {"ended": ended, "asked": len(answers)})


def canaries(subject: Subject) -> Check:
    """Each answer contains the expected text, in upper or lower case."""
    details, passed = [], 0
    for canary in subject.golden.canaries:
        answer = subject.client.chat(subject.model, canary.messages, subject.answer_tokens).text
        holds = canary.expect.casefold() in answer.casefold()
        passed += holds
        details.append(f"{canary.expect!r} is {'' if holds else 'not '}in: {' '.join(answer.split())}")
    count = len(subject.golden.canaries)
    figures = {"asked": count, "passed": passed}
    return Check("canaries", passed == count, f"{passed} of {count}", "all answers hold it", figures, tuple(details))


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
    log_probs: list[float] = []
    prompts = subject.golden.prompts
    for done, prompt in enumerate(prompts):
        progress(f"golden prompts, {model}", done, len(prompts))
        log_probs += subject.client.log_probs(model, prompt.token_ids)
    progress(f"golden prompts, {model}", len(prompts), len(prompts))
    return log_probs


def _base(golden: Golden) -> list[float]:
    return [*chain.from_iterable(prompt.base or () for prompt in golden.prompts)]


def _within(name: str, difference: Difference, subject: Subject) -> Check:
    limits, prompts = subject.limits, subject.golden.prompts
    passed = difference.mean <= limits.mean and difference.p99 <= limits.p99
    tokens = sum(len(prompt.result) for prompt in prompts)
    expected = f"at most {limits.mean:g} and {limits.p99:g}, on {len(prompts)} prompts, {tokens} tokens"
    figures = {"mean": difference.mean, "p99": difference.p99, "prompts": len(prompts), "tokens": tokens}
    return Check(name, passed, str(difference), expected, figures)


def _asked(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except RequestRefused as refused:
        return _refusal(name, refused)


def _refusal(name: str, refused: RequestRefused) -> Check:
    return Check(name, False, f"vLLM refuses the request: {refused}", "an answer")


def _slope(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """The least-squares slope of y = slope · x, and its standard error.

    The error is infinite where x is all zeros or y is not finite.
    """
    power = sum(a * a for a in x)
    if not power or not all(map(math.isfinite, y)):
        return (1.0 if not power else math.inf), math.inf
    slope = sum(a * b for a, b in zip(x, y, strict=True)) / power
    rest = sum((b - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    return slope, math.sqrt(rest / max(1, len(x) - 1) / power)


def _first_difference(served: str, chat: GoldenChat) -> str:
    """The first difference of two texts, with the text that follows in both."""
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
