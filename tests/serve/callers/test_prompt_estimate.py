"""The estimate of a prompt's tokens follows the density of a caller's own texts."""

from __future__ import annotations

from serve.callers.prompt_estimate import PromptEstimator, text_bytes
from serve.engine.prompt_size import PromptSize
from serve.gateway.body import parse_fields

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def estimator() -> PromptEstimator:
    return PromptEstimator(PromptSize(tokens_per_byte=0.25, template_tokens=10))


def test_only_what_a_prompt_is_made_from_counts() -> None:
    fields = parse_fields(
        b'{"model": "tiny", "stream": true, "max_tokens": 4, "prompt": "the rain", "tools": [1], "n": null}'
    )

    assert text_bytes(fields | {"model": "tiny@0123"}) == len('"the rain"') + len("[1]")


def test_a_prompt_is_estimated_by_what_was_measured() -> None:
    assert estimator().estimate("team-a", COMPLETIONS, 402) == 101 + 1
    assert estimator().estimate("team-a", CHAT, 402) == 101 + 10


def test_a_caller_with_dense_texts_reserves_more_at_once_and_no_other_does() -> None:
    prompts = estimator()
    prompts.observe("digits", CHAT, 400, 10 + 200)

    assert prompts.estimate("digits", CHAT, 400) == 10 + 200
    assert prompts.estimate("team-a", CHAT, 400) == 10 + 100


def test_dense_texts_are_forgotten_slowly_and_never_below_the_measure() -> None:
    prompts = estimator()
    prompts.observe("team-a", COMPLETIONS, 400, 400)
    prompts.observe("team-a", COMPLETIONS, 400, 40)
    assert 100 < prompts.estimate("team-a", COMPLETIONS, 400) < 400

    for _ in range(100):
        prompts.observe("team-a", COMPLETIONS, 400, 40)
    assert prompts.estimate("team-a", COMPLETIONS, 400) == 101


def test_no_more_tokens_than_bytes_are_expected() -> None:
    prompts = estimator()
    prompts.observe("team-a", COMPLETIONS, 100, 5000)

    assert prompts.estimate("team-a", COMPLETIONS, 100) == 101
