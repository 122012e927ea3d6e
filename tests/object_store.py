"""A real S3 API server on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def s3_server() -> Iterator[str]:
    """Its address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def bucket_url(endpoint: str, name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket for a test of that name, and the environment to reach it in."""
    import boto3

    variables = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
    }
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    bucket = f"graft-{abs(hash(name))}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return f"s3://{bucket}/prod"
