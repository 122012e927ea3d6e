"""The size of prompts is measured with the engine's own tokenizer. Here that is the application's only route."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from serve.engine.prompt_size import PromptSize, measure


def application(*, has_tokenizer: bool = True, has_template: bool = True) -> Starlette:
    """A tokenizer with two bytes for a token of code, and three for one of prose."""

    async def tokenize(request: Request) -> JSONResponse:
        body = await request.json()
        if not (has_template if "messages" in body else has_tokenizer):
            return JSONResponse({"error": {}}, status_code=400)
        text = body.get("prompt", "x" * 90)
        return JSONResponse({"count": len(text) // (2 if "class" in text else 3)})

    return Starlette(routes=[Route("/tokenize", tokenize, methods=["POST"])])


async def test_the_denser_text_is_the_measure_and_the_template_is_counted_apart() -> None:
    assert await measure(application()) == PromptSize(pytest.approx(1 / 2, abs=0.01), 30)


async def test_without_a_tokenizer_every_byte_may_be_a_token() -> None:
    assert await measure(application(has_tokenizer=False, has_template=False)) == PromptSize(1.0, 0)
