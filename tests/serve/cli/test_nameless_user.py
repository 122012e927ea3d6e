"""Containers of OpenShift run as a number that the system has no name for."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.serve.conftest import MakeArtifact

ROOT = Path(__file__).parents[3]
NAMELESS = 1_000_680_000

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")

# All is imported first: the nameless user may not read where this machine has its packages.
REGISTER = f"""
import getpass, os, pickle, sys
from pathlib import Path
import numpy
from serve.adapters.admission import Admission
from serve.catalogue.state_dir import StateDir
from serve.deployment.pools.bootstrap import register
from serve.deployment.pools.bundle import bundles_of
from serve.settings import ServeSettings

os.setgroups([])
os.setgid(0)
os.setuid({NAMELESS})
try:
    getpass.getuser()
except (KeyError, OSError):
    print("nameless")
(bundle,), state = bundles_of([Path(sys.argv[1])]), StateDir(sys.argv[2])
state.prepare()
with state.claimed():
    settings = ServeSettings.model_validate({{
        "engine": {{"model_path": str(bundle.model_path), "model_name": "base", "fingerprint": bundle.fingerprint}},
        "gateway": {{"admin_tokens": state.admin_tokens()}},
        "state_dir": str(state.root),
    }})
    register([bundle], settings, state)
print(state.log.history(None, 1)[0][1].by)
"""


@needs_root
def test_a_server_registers_its_artifacts_as_a_user_without_a_name(make_artifact: MakeArtifact) -> None:
    with pytest.raises(KeyError):
        pwd.getpwuid(NAMELESS)
    named = ("LOGNAME", "USER", "LNAME", "USERNAME")
    environment = {name: value for name, value in os.environ.items() if name not in named}
    with tempfile.TemporaryDirectory() as home:
        artifact = shutil.copytree(make_artifact("a").root, Path(home) / "a")
        state = Path(home) / "state"
        state.mkdir()
        for path in (Path(home), *Path(home).rglob("*")):
            os.chown(path, NAMELESS, 0)

        ended = subprocess.run(
            [sys.executable, "-c", REGISTER, artifact, state],
            cwd=ROOT, env=environment, text=True, capture_output=True, check=False, timeout=300,
        )  # fmt: skip

    assert ended.stdout.split() == ["nameless", str(NAMELESS)], ended.stderr
