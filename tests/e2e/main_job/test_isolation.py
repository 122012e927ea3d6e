"""A server keeps to itself: where it listens, which proxies it uses, and what happens when memory is short.

The fixture `server` runs with a proxy in its environment, and with a threshold at which Ray's memory monitor would kill
every engine at once.
"""

from __future__ import annotations

import re
from pathlib import Path

import psutil

from serve.follower.admin_client import AdminClient
from tests.e2e.conftest import REPLICAS, Server, arguments_of
from tests.e2e.main_job.control import answer

PAGE = Path(__file__).parents[3] / "docs" / "explanation" / "security.md"
ROWS = re.compile(r"^\| (`[^|]+) \| [^|]+ \| [^|]+ \|$", re.MULTILINE)  # the first column of the table of sockets

# Ray asks in which cloud it runs.
CLOUD_METADATA = re.compile(rb"GET http://(169\.254\.169\.254|metadata\.google\.internal)/")


def name_of(process: psutil.Process) -> str:
    """As the page names it."""
    arguments = arguments_of(process)
    return " ".join(arguments[2:4]) if arguments[2:3] == ["serve"] else str(process.name())


def listening_sockets(process: psutil.Process) -> set[tuple[str, str]]:
    """The process's name and an address, for each; none of a process that has ended meanwhile."""
    try:
        connections = process.net_connections("inet")
        listening = [connection for connection in connections if connection.status == psutil.CONN_LISTEN]
        return {(name_of(process), connection.laddr.ip.removeprefix("::ffff:")) for connection in listening}
    except psutil.NoSuchProcess:
        return set()


def test_everything_listens_where_the_page_says(server: Server) -> None:
    """Both hosts are the default ones, which are loopback too."""
    names = {name for row in ROWS.findall(PAGE.read_text()) for name in re.findall("`([^`]+)`", row)}
    listening = {socket for process in server.processes() for socket in listening_sockets(process)}

    assert {(name, address) for name, address in listening if address not in ("127.0.0.1", "::1")} == set()
    assert {name for name, _ in listening if not name.startswith(tuple(names))} == set()
    assert {name for name in names if not any(listener.startswith(name) for listener, _ in listening)} == set()


def test_no_request_passes_the_proxy_of_the_environment(server: Server, admin: AdminClient) -> None:
    assert answer(server, "french").status_code == 200
    assert len(admin.replicas()) == REPLICAS

    assert server.proxy is not None
    assert [line for line in server.proxy.first_lines if not CLOUD_METADATA.match(line)] == []


def test_no_process_is_ended_before_others_when_memory_is_short(server: Server) -> None:
    assert len(server.actors("ServeReplica")) == REPLICAS
    own = int(Path("/proc/self/oom_score_adj").read_text())
    assert {score for process in server.processes() for score in out_of_memory_scores(process)} == {own}


def out_of_memory_scores(process: psutil.Process) -> list[int]:
    """One, or none of a process that has ended meanwhile."""
    try:
        return [int(Path(f"/proc/{process.pid}/oom_score_adj").read_text())]
    except (FileNotFoundError, ProcessLookupError):
        return []
