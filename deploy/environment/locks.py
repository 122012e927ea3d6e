"""The locks beside this file: exact versions, and the digests of the files that they may be installed from."""

import platform
import re
import sys
from functools import cache
from pathlib import Path

ENVIRONMENT = Path(__file__).resolve().parent
DIGESTS = ENVIRONMENT / "wheels.sha256"  # written by hash_wheels.py
# Name of a layer, and of its directory in the environment -> its lock.
LAYERS = {"quantizers": "quantize"}


class SetUpError(Exception):
    """The environment can't be made; the message says why and what to do."""


def read_lock(path: Path) -> list[str]:
    """The `name==version` lines of a lock."""
    if not path.is_file():
        known = ", ".join(sorted({file.stem for file in path.parent.glob("*.lock")} - set(LAYERS.values())))
        raise SetUpError(f"there is no lock {path.stem!r}; known: {known}")
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    pins = [line for line in lines if line]
    loose = [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.+!]+", pin)]
    if loose:
        raise SetUpError(f"{path.name}: not pinned as name==version: {', '.join(loose)}")
    return pins


@cache
def digests() -> dict[str, str]:
    """The SHA-256 of each file that a package may be installed from, by the file's name."""
    return dict(line.split()[::-1] for line in DIGESTS.read_text().splitlines())


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pin_of(file: str) -> str:
    """The `name==version` that a wheel, or a source, is of."""
    if file.endswith(".whl"):
        name, version = file.split("-")[:2]
    else:
        name, _, version = file.removesuffix(".tar.gz").rpartition("-")
    return f"{normalized(name)}=={version}"


@cache
def files_by_pin() -> dict[str, list[str]]:
    files: dict[str, list[str]] = {}
    for file in digests():
        files.setdefault(pin_of(file), []).append(file)
    return files


def files_of(pin: str) -> list[str]:
    name, _, version = pin.partition("==")
    return files_by_pin().get(f"{normalized(name)}=={version}", [])


def with_digests(pin: str) -> str:
    """The pin as a requirement that pip takes from no other file than the known ones."""
    files = files_of(pin)
    if not files:
        raise SetUpError(f"{DIGESTS.name} has no file of {pin}; run hash_wheels.py after a change of a lock")
    return " ".join([pin, *(f"--hash=sha256:{digests()[file]}" for file in files)])


def is_known_here(pin: str) -> bool:
    """Whether the digest of this Python's wheel for this machine is known."""
    tag = f"-cp{sys.version_info[0]}{sys.version_info[1]}-"
    return any(tag in file and file.endswith(f"{platform.machine()}.whl") for file in files_of(pin))
