"""The HTTP clients for servers of Graft: this command's own server, other replicas, and what a benchmark starts.

None of them uses a proxy. httpx takes one from HTTP_PROXY, HTTPS_PROXY and ALL_PROXY by default, for the loopback
address too: a proxy outside would get the prompts and the keys. SSL_CERT_FILE and SSL_CERT_DIR still count.
"""

from __future__ import annotations

from typing import Any

import httpx


def direct_client(**options: Any) -> httpx.Client:
    """`options`: further arguments of httpx.Client."""
    return httpx.Client(trust_env=False, verify=httpx.create_ssl_context(trust_env=True), **options)


def direct_async_client(**options: Any) -> httpx.AsyncClient:
    """`options`: further arguments of httpx.AsyncClient."""
    return httpx.AsyncClient(trust_env=False, verify=httpx.create_ssl_context(trust_env=True), **options)
