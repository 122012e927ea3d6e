"""Requests with an invalid field, body, header, model name or path."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

_CHAT = "/v1/chat/completions"
_MESSAGES = [{"role": "user", "content": "hello"}]
# Valid requests; each case changes one thing in one of them.
ROUTES: Mapping[str, Mapping[str, Any]] = {
    _CHAT: {"model": "base", "messages": _MESSAGES, "max_tokens": 2},
    "/v1/completions": {"model": "base", "prompt": "hello", "max_tokens": 2},
    "/v1/responses": {"model": "base", "input": "hello", "max_output_tokens": 2},
    "/v1/messages": {"model": "base", "messages": _MESSAGES, "max_tokens": 2},
    "/tokenize": {"model": "base", "prompt": "hello"},
    "/detokenize": {"model": "base", "tokens": [5, 6]},
}
_FIELDS = (
    *("temperature", "top_p", "top_k", "n", "seed", "stop", "logprobs", "top_logprobs", "logit_bias", "stream"),
    *("presence_penalty", "max_completion_tokens", "response_format", "tools", "tool_choice", "stream_options"),
    *("messages", "prompt", "input", "model", "user", "tokens", "echo", "suffix", "best_of", "min_tokens"),
    "text",
    *("guided_regex", "structured_outputs", "truncate_prompt_tokens", "chat_template", "chat_template_kwargs"),
)
_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**31, 2**64, -(2**63), 1e308, "", "x", "\x00", "\ud800", "😀" * 100, [], {}, [[]], [None]),
    *([{}], {"": None}, {"type": "json_schema"}, {"type": "../../etc/passwd"}, [{"role": "user"}], ["a"] * 1000),
    *({"$ref": "#"}, {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}),
    *({"grammar": "root ::= root"}, [{"type": "web_search"}], {"format": {"type": "json_schema", "name": "x"}}),
    *([-1], [2**40], {"__proto__": {"x": 1}}, "{{ cycler.__init__.__globals__ }}", "(a+)+$"),
)
_BODIES = (
    *(
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"7",
        b"{",
        b"{]",
        b'{"model": }',
        b"\x00" * 64,
        b"\xff\xfe",
        b"NaN",
        b"\xef\xbb\xbf{}",
        b'\xef\xbb\xbf{"model": "base", "prompt": "x", "max_tokens": 2}',
        b'{"model": "base", "prompt": "\xff"}',
        '{"model": "base", "prompt": "x"}'.encode("utf-16"),
    ),
    *(
        b"[" * 50_000,
        b'{"a":' * 20_000,
        b'{"model": "base", "model": 7}',
        b'{"model": "\\ud800"}',
        b"{" + b" " * 100_000,
    ),
    *(b'{"max_tokens": 1e400, "model": "base", "prompt": "x"}', b'{"n": Infinity, "model": "base", "prompt": "x"}'),
)
_NAMES = (
    *(
        "../../etc/passwd",
        "french@",
        "@",
        "french@../x",
        "french@" + "0" * 64,
        "a" * 10_000,
        "\x00",
        "%2e%2e",
        "base\n",
    ),
    *("german@zzzz", "{{7*7}}", "$(id)", "'; DROP TABLE adapters; --", "http://169.254.169.254/", "file:///etc/passwd"),
)
_PATHS = (
    *("/v1/../admin/v1/adapters", "/v1/models/..%2f..%2fetc%2fpasswd", "//admin/v1/adapters", "/admin/v1/replicas"),
    *("/admin/v1/adapters/../../x", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/collective_rpc", "/sleep"),
    *(
        "/reset_prefix_cache",
        "/server_info",
        "/start_profile",
        "/scale_elastic_ep",
        "/pause",
        "/is_sleeping",
        "/metrics",
    ),
    *(
        "/docs",
        "/v1/" + "a" * 5000,
        "/v1/models/%00",
        "/v1/models/" + "%41" * 500,
        "/.env",
        "/v1/files",
        "/v1/models/",
        "/v1/chat/completions/",
        "//elsewhere.example/",
        "/v1/models/base@000000000000",
        "/api/serve/x",
    ),
)


@dataclass(frozen=True)
class BadRequest:
    method: str
    path: str
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def bad_requests() -> list[BadRequest]:
    """The same requests every time. Some are valid: 0 is a valid temperature."""
    return [*_bad_fields(), *_bad_streams(), *_bad_bodies(), *_bad_names(), *_bad_paths(), *_bad_headers()]


def _bad_fields() -> Iterator[BadRequest]:
    for path, good in ROUTES.items():
        for name in _FIELDS:
            for value in _VALUES:
                yield BadRequest("POST", path, json.dumps({**good, name: value}).encode(), _JSON)


_JSON = {"content-type": "application/json"}


def _bad_streams() -> Iterator[BadRequest]:
    """Errors that a server finds only after it has begun a stream, if it begins one at once."""
    chat = {**ROUTES[_CHAT], "stream": True}
    schema = {"name": "x", "schema": {"$ref": "#"}}
    changes: tuple[dict[str, Any], ...] = (
        {"response_format": {"type": "json_schema", "json_schema": schema}},
        *({"structured_outputs": value} for value in ({"grammar": "root ::= root"}, {"regex": "("})),
        *({"logit_bias": {"100000000": 1}}, {"allowed_token_ids": [10**9]}, {"stop_token_ids": [-5]}),
        {"messages": [{"role": "user", "content": "word " * 100_000}]},
    )
    for change in changes:
        yield BadRequest("POST", _CHAT, json.dumps({**chat, **change}).encode(), _JSON)


def _bad_bodies() -> Iterator[BadRequest]:
    for path in ROUTES:
        for body in _BODIES:
            yield BadRequest("POST", path, body, _JSON)


def _bad_names() -> Iterator[BadRequest]:
    for path, good in ROUTES.items():
        for name in _NAMES:
            yield BadRequest("POST", path, json.dumps({**good, "model": name}).encode(), _JSON)


def _bad_paths() -> Iterator[BadRequest]:
    for path in _PATHS:
        for method in ("GET", "POST", "DELETE"):
            yield BadRequest(method, path)


def _bad_headers() -> Iterator[BadRequest]:
    body = json.dumps(ROUTES[_CHAT]).encode()
    for headers in (
        *({"authorization": "Bearer"}, {"authorization": "Basic Og=="}, {"authorization": "Bearer " + "x" * 8000}),
        *({"content-type": "text/plain"}, {"content-type": "multipart/form-data; boundary=x"}),
        *(
            {"content-encoding": "gzip"},
            {"x-request-id": "a" * 2000},
            {"x-graft-caller": "é" * 10},
            {"accept": "x" * 999},
        ),
        *(
            {"traceparent": "00-zz"},
            {"x-graft-replica": "nobody"},
            {"host": "elsewhere.example"},
            {"expect": "100-continue"},
        ),
    ):
        yield BadRequest(
            "POST", _CHAT, body, _JSON | {name: value.encode().decode("latin-1") for name, value in headers.items()}
        )
