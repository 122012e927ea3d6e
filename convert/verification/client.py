"""A client of vLLM's HTTP API over a Unix socket, with the requests that verification needs."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.artifact import GOLDEN_CHAT_ARGUMENTS


class RequestRefused(Exception):
    """vLLM refused the request, with vLLM's message."""


class EngineLost(Exception):
    """vLLM failed during a request, or its process has ended."""


@dataclass(frozen=True)
class Answer:
    """Generated text, and why it ended: `stop` for a stop token, `length` for the limit on tokens."""

    text: str
    finish_reason: str


class EngineClient:
    """Requests to the engine behind `path`. Threads may share it: each request has a connection of its own."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        self._path = path
        self._timeout_s = timeout_s

    def is_healthy(self) -> bool:
        """Whether the server answers and its engine runs."""
        try:
            status, _ = self._exchange("GET", "/health", None)
        except EngineLost:
            return False
        return status == http.HTTPStatus.OK

    def version(self) -> str:
        return str(self._ask("GET", "/version", None)["version"])

    def log_probs(self, model: str, prompt: Sequence[int]) -> list[float]:
        """Log-probability of every token but the first, given the tokens before it.

        Each request has one prompt, and requests follow one another: vLLM 0.32 on a CPU sizes its LoRA buffers for the
        logits by the number of requests instead of prompt tokens, and fails on two such prompts in one batch.
        """
        document = {"model": model, "prompt": list(prompt), "max_tokens": 1, "prompt_logprobs": 0}
        steps = self._ask("POST", "/v1/completions", document)["choices"][0]["prompt_logprobs"]
        return [float(step[str(token)]["logprob"]) for token, step in zip(prompt[1:], steps[1:], strict=True)]

    def generate(self, model: str, prompt: Sequence[int], tokens: int, **settings: Any) -> Answer:
        """The greedy continuation of token ids."""
        document = {"model": model, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, **settings}
        choice = self._ask("POST", "/v1/completions", document)["choices"][0]
        return Answer(choice["text"], choice["finish_reason"])

    def chat(self, model: str, messages: Sequence[Mapping[str, str]], tokens: int) -> Answer:
        """The greedy answer to a conversation."""
        document = self._chat(model, messages) | {"max_tokens": tokens, "temperature": 0}
        choice = self._ask("POST", "/v1/chat/completions", document)["choices"][0]
        return Answer(choice["message"]["content"] or "", choice["finish_reason"])

    def chat_tokens(self, model: str, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation as vLLM renders it, ready for an answer."""
        return self._tokens(self._chat(model, messages) | {"add_generation_prompt": True})

    def text_tokens(self, model: str, text: str) -> list[int]:
        """Token ids of text that already holds its special tokens."""
        return self._tokens({"model": model, "prompt": text, "add_special_tokens": False})

    def text(self, model: str, tokens: Sequence[int]) -> str:
        return str(self._ask("POST", "/detokenize", {"model": model, "tokens": list(tokens)})["prompt"])

    def _chat(self, model: str, messages: Sequence[Mapping[str, str]]) -> dict[str, Any]:
        return {"model": model, "messages": list(messages), "chat_template_kwargs": dict(GOLDEN_CHAT_ARGUMENTS)}

    def _tokens(self, document: Mapping[str, Any]) -> list[int]:
        return [int(token) for token in self._ask("POST", "/tokenize", document)["tokens"]]

    def _ask(self, method: str, path: str, document: Mapping[str, Any] | None) -> Any:
        status, body = self._exchange(method, path, document)
        if status >= http.HTTPStatus.INTERNAL_SERVER_ERROR:
            raise EngineLost(f"{path}: {_message(body)}")
        if status != http.HTTPStatus.OK:
            raise RequestRefused(f"{path}: {_message(body)}")
        return json.loads(body)

    def _exchange(self, method: str, path: str, document: Mapping[str, Any] | None) -> tuple[int, bytes]:
        connection = _UnixConnection(self._path, self._timeout_s)
        body = None if document is None else json.dumps(document)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException) as cause:
            raise EngineLost(f"{path}: {cause or type(cause).__name__}") from cause
        finally:
            connection.close()


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def _message(body: bytes) -> str:
    """vLLM's error message, or else the beginning of the body."""
    try:
        return " ".join(str(json.loads(body)["error"]["message"]).split())
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:500] or "no reason given"
