"""Write `wheels.sha256`: the digest of every file that a lock beside this script may be installed from.

    python deploy/environment/hash_wheels.py        # after a change of a lock; needs uv, and asks the package index

Lines as `sha256sum --check` reads them. `create.py` has pip refuse any other file. Of a package without wheels its
source counts. The CPU builds of torch are not on PyPI: their lines stay as they are, and are changed by hand.
"""

import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

ENVIRONMENT = Path(__file__).resolve().parent
DIGESTS = ENVIRONMENT / "wheels.sha256"
PYTHONS = ("3.11.9", "3.12.3")
PLATFORM = "x86_64-manylinux_2_36"  # some packages of the locks have no wheel for another one
_KEPT = "+cpu-"


def files_of(lock: Path, python: str) -> Iterator[tuple[str, str]]:
    """Name and SHA-256 of each file that fits."""
    with tempfile.TemporaryDirectory() as directory:
        lock_file = Path(directory) / "pylock.toml"
        command = ["uv", "pip", "compile", "--quiet", "--no-deps", "--format", "pylock.toml"]
        where = ["--python-version", python, "--python-platform", PLATFORM, "--output-file", str(lock_file)]
        subprocess.run([*command, *where, str(lock)], check=True)
        for package in tomllib.loads(lock_file.read_text())["packages"]:
            for file in package.get("wheels") or [package["sdist"]]:
                yield unquote(file["url"].rpartition("/")[2]), file["hashes"]["sha256"]


def main() -> None:
    known = dict(line.split()[::-1] for line in DIGESTS.read_text().splitlines()) if DIGESTS.exists() else {}
    digests = {name: digest for name, digest in known.items() if _KEPT in name}
    for lock in sorted(ENVIRONMENT.glob("*.lock")):
        for python in PYTHONS:
            digests |= dict(files_of(lock, python))
    DIGESTS.write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())))
    sys.stdout.write(f"{len(digests)} files in {DIGESTS}\n")


if __name__ == "__main__":
    main()
