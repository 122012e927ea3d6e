"""A server keeps to itself: where it listens, which proxies it uses, and what happens when memory is short.

The fixture `server` runs with a proxy in its environment, and with a threshold at which Ray's memory monitor would kill
every engine at once.
"""

from __future__ import annotations

import re
from pathlib import Path

import psutil

from serve.follower.admin_client import AdminClient
from tests.e2e.conftest import REPLICAS, Server
from tests.e2e.main_job.control import answer

PAGE = Path(__file__).parents[3] / "docs" / "explanation" / "security.md"
ROWS = re.compile(r"^\| (`[^|]+) \| [^|]+ \| [^|]+ \|$", re.MULTILINE)  # the first column of the table of sockets

# Ray asks in which cloud it runs.
CLOUD_METADATA = re.compile(rb"GET http://(169\.254\.169\.254|metadata\.google\.internal)/")


def name_of(process: psutil.Process) -> str:
    """As the page names it."""
    arguments = process.cmdline()
    return " ".join(arguments[2:4]) if arguments[2:3] == ["serve"] else str(process.name())


def test_everything_listens_where_the_page_says(server: Server) -> None:
    """Both hosts are the default ones, which are loopback too."""
    names = {name for row in ROWS.findall(PAGE.read_text()) for name in re.findall("`([^`]+)`", row)}
    listening = {
        (name_of(process), connection.laddr.ip.removeprefix("::ffff:"))
        for process in server.processes()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }

    assert {(name, address) for name, address in listening if address not in ("127.0.0.1", "::1")} == set()
    assert {name for name, _ in listening if not name.startswith(tuple(names))} == set()
    assert {name for name in names if not any(listener.startswith(name) for listener, _ in listening)} == set()


def test_no_request_passes_the_proxy_of_the_environment(server: Server, admin: AdminClient) -> None:
    assert answer(server, "french").status_code == 200
    assert len(admin.replicas()) == REPLICAS

    assert server.proxy is not None
    assert [line for line in server.proxy.first_lines if not CLOUD_METADATA.match(line)] == []


def test_no_process_is_ended_before_others_when_memory_is_short(server: Server) -> None:
    processes = server.processes()

    assert len(server.actors("ServeReplica")) == REPLICAS
    assert all(process.is_running() for process in processes)
    own = int(Path("/proc/self/oom_score_adj").read_text())
    assert {int(Path(f"/proc/{process.pid}/oom_score_adj").read_text()) for process in processes} == {own}
