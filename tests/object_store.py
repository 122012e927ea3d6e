"""A real S3 API server on this machine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

_OPERATIONS = {"GET": "read", "PUT": "write", "DELETE": "delete"}


@contextmanager
def s3_server(operations: list[str] | None = None, host: str = "127.0.0.1") -> Iterator[str]:
    """Its address. `operations` gets a word for each request as it arrives: list, read, write or delete."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address=host, port=0, verbose=False)
    server.start()
    assert server._server
    answer = server._server.app

    def record(environment: dict[str, Any], start: Any) -> Iterable[bytes]:
        if operations is not None:
            is_listing = "list-type" in environment["QUERY_STRING"]
            operations.append("list" if is_listing else _OPERATIONS[environment["REQUEST_METHOD"]])
        return answer(environment, start)

    server._server.app = record
    try:
        _, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def bucket_url(endpoint: str, name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket for a test of that name, and the environment to reach it in."""
    import boto3

    for variable, value in credentials(endpoint).items():
        monkeypatch.setenv(variable, value)
    bucket = f"graft-{abs(hash(name))}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return f"s3://{bucket}/prod"


def credentials(endpoint: str) -> dict[str, str]:
    """The environment to reach the server's buckets in."""
    return {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
    }
