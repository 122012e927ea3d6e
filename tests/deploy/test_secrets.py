"""`make lint` finds keys of known forms; that it does is tried on a planted one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.manifests import ROOT

OPTIONS = re.findall(r"--disable-plugin \w+", (ROOT / "Makefile").read_text())

# In halves, so that this file holds none.
PLANTED = {
    "GitHub": "ghp_" + "aB3dE5gH7jK9mN1pQ3sT5vX7zA9cE1gI3kM5",
    "Amazon": "AKIA" + "Q3EGRXL7VWPNTD5K",
    "private key": "-----BEGIN RSA " + "PRIVATE KEY-----",
    "password in a URL": "redis://graft:" + "hunter2hunter2@cache:6379/0",
}


def scan(path: Path) -> subprocess.CompletedProcess[str]:
    hook = Path(sys.executable).with_name("detect-secrets-hook")
    options = [part for option in OPTIONS for part in option.split()]
    return subprocess.run([hook, *options, path], check=False, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("secret", PLANTED.values(), ids=PLANTED)
def test_a_planted_secret_is_found(tmp_path: Path, secret: str) -> None:
    (tmp_path / "settings.py").write_text(f'KEY = "{secret}"\n')

    assert scan(tmp_path / "settings.py").returncode == 1


def test_digests_are_no_secrets(tmp_path: Path) -> None:
    (tmp_path / "digests.py").write_text(f'DIGEST = "{"0123456789abcdef" * 4}"\n')

    assert scan(tmp_path / "digests.py").returncode == 0
