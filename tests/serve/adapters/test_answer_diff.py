from __future__ import annotations

import json

import pytest

from serve.adapters.answer_diff import Comparison, compare, text_of


def stream(*texts: str) -> bytes:
    chunks = [json.dumps({"choices": [{"delta": {"content": text}}]}) for text in texts]
    return "".join(f"data: {chunk}\n\n" for chunk in [*chunks, "[DONE]"]).encode()


@pytest.mark.parametrize(
    ("body", "text"),
    [
        pytest.param(b'{"choices": [{"message": {"content": "Ahoy!"}}]}', "Ahoy!", id="chat"),
        pytest.param(b'{"choices": [{"text": "Ahoy!"}, {"text": " Aye."}]}', "Ahoy! Aye.", id="completion-of-two"),
        pytest.param(stream("A", "hoy", "!"), "Ahoy!", id="stream"),
        pytest.param(b'data: {"choices": [], "usage": {}}\n\ndata: {"choices": [{"text": "A"}]}\n\n', "A", id="usage"),
        pytest.param(b'{"choices": [{"message": {"content": null}}]}', "", id="tool-call"),
        pytest.param(b'{"data": [{"embedding": [1, 2]}]}', None, id="embedding"),
        pytest.param(b"[1]", None, id="a-list"),
        pytest.param(b"\xff", None, id="not-json"),
        pytest.param(b"", None, id="empty"),
    ],
)
def test_the_text_of_an_answer_is_found_in_any_of_its_shapes(body: bytes, text: str | None) -> None:
    assert text_of(body) == text


@pytest.mark.parametrize(
    ("answer", "shadow_answer", "expected"),
    [
        ("It is marmalade.", "It is marmalade.", Comparison(True, 4, 4)),
        ("It is marmalade.", "It is saffron, sir.", Comparison(False, 2, 6)),
        ("It is", "It  is", Comparison(False, 2, 2)),
        ("", "", Comparison(True, 0, 0)),
    ],
)
def test_answers_are_compared_word_by_word_from_the_beginning(
    answer: str, shadow_answer: str, expected: Comparison
) -> None:
    assert compare(answer, shadow_answer) == expected
