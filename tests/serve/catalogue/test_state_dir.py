"""One server for a state directory, for as long as it lives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from serve.catalogue.state_dir import StateDir
from serve.errors import StateInvalid

SERVER = """
import sys
from pathlib import Path
from serve.catalogue.state_dir import StateDir
state = StateDir(Path(sys.argv[1]))
with state.claimed():
    print("claimed", flush=True)
    sys.stdin.readline()
    state.announce("http://127.0.0.1:8000")
    print("announced", flush=True)
    sys.stdin.readline()
    state.withdraw()
"""


def test_a_state_directory_belongs_to_one_server_until_that_ends(tmp_path: Path) -> None:
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin
    assert server.stdout
    assert server.stdout.readline() == "claimed\n"

    # It takes minutes to start, and says where it is only then.
    with pytest.raises(StateInvalid, match="in use by another server, which is starting"), StateDir(tmp_path).claimed():
        pass
    print(file=server.stdin, flush=True)
    assert server.stdout.readline() == "announced\n"
    with pytest.raises(StateInvalid, match="in use by the server at http://127"), StateDir(tmp_path).claimed():
        pass
    assert StateDir(tmp_path).running_server().pid == server.pid, "the one that was refused took nothing away"

    server.kill()
    server.communicate()
    with StateDir(tmp_path).claimed():
        pass
