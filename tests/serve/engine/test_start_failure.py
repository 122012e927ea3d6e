"""Why an engine did not start: the cause that its process printed, and whether it is tried again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from serve.engine.start_failure import engine_failures, printed_cause, refusals
from serve.engine.vllm_engine import drop_service_link
from serve.errors import EngineRefused, EngineStartFailed

# As vLLM prints it: by its log, and again when the process ends.
PRINTED = """\
(EngineCore pid=17) ERROR 11-30 02:00:00 [core.py:1510] EngineCore failed to start.
(EngineCore pid=17) ERROR 11-30 02:00:00 [core.py:1510] Traceback (most recent call last):
(EngineCore pid=17) ERROR 11-30 02:00:00 [core.py:1510]   File "core.py", line 1, in run_engine_core
(EngineCore pid=17) ERROR 11-30 02:00:00 [core.py:1510]     raise ValueError("no room")
(EngineCore pid=17) ERROR 11-30 02:00:00 [core.py:1510] ValueError: no room for 4096 tokens
Process EngineCore:
Traceback (most recent call last):
  File "core.py", line 1, in run_engine_core

ValueError: no room for 4096 tokens
Traceback (most recent call last):
  File "replica.py", line 1, in start
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""

# A process whose child fails as the process of an engine does.
START = """
import subprocess, sys
from serve.engine.start_failure import engine_failures
from serve.errors import EngineStartFailed
print("Traceback (most recent call last):\\n  of an earlier failure\\nKeyError: 'earlier'", file=sys.stderr, flush=True)
try:
    with engine_failures():
        subprocess.run([sys.executable, "-c", sys.argv[1]])
        raise RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")
except EngineStartFailed as error:
    print(type(error).__name__, error)
"""


def start(child: str, stderr: Path) -> str:
    with stderr.open("w") as file:
        return subprocess.run(
            [sys.executable, "-c", START, child], stdout=subprocess.PIPE, stderr=file, text=True, check=True
        ).stdout.strip()


@pytest.mark.parametrize(
    "output", [PRINTED, PRINTED.replace("(EngineCore pid=17) ERROR 11-30 02:00:00 [core.py:1510] ", "")]
)
def test_the_cause_is_the_last_traceback_that_refers_to_no_other(output: str) -> None:
    assert printed_cause(output) == "ValueError: no room for 4096 tokens"
    assert printed_cause("a warning\nValueError: in no traceback\n") is None


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        ("ValueError('no room')", "EngineRefused vLLM can't serve this: ValueError: no room"),
        ("RuntimeError('CUDA error')", "EngineStartFailed vLLM can't serve this: RuntimeError: CUDA error"),
        (
            "ValueError('Free memory on device is less than desired')",
            "EngineStartFailed vLLM can't serve this: ValueError: Free memory on device is less than desired",
        ),
    ],
    ids=["refused", "may pass", "memory that another process releases"],
)
def test_the_reason_of_an_engine_is_what_its_process_printed(tmp_path: Path, raised: str, expected: str) -> None:
    assert start(f"raise {raised}", tmp_path / "stderr") == expected


def test_an_engine_that_printed_nothing_is_reported_as_vllm_reports_it(tmp_path: Path) -> None:
    assert start("", tmp_path / "stderr") == (
        "EngineStartFailed vLLM can't serve this: RuntimeError: Engine core initialization failed. "
        "See root cause above. Failed core proc(s): {}"
    )


def test_what_vllm_refuses_before_its_engine_starts_is_refused_for_good() -> None:
    with pytest.raises(EngineRefused, match=r"^vLLM can't serve this: no tokens for this parser$"), refusals():
        raise RuntimeError("no tokens\nfor this parser")
    with pytest.raises(EngineStartFailed, match="own error"), refusals():
        raise EngineStartFailed("own error")
    with pytest.raises(EngineRefused), engine_failures():
        raise ValueError("in this process")


@pytest.mark.parametrize(
    ("value", "kept"), [("tcp://10.0.0.7:8000", None), ("", None), ("29500", "29500"), (None, None)]
)
def test_the_address_of_a_kubernetes_service_is_not_taken_for_a_port(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, value: str | None, kept: str | None
) -> None:
    import os

    from vllm import envs

    monkeypatch.delenv("VLLM_PORT", raising=False)
    if value is not None:
        monkeypatch.setenv("VLLM_PORT", value)

    drop_service_link()

    assert os.environ.get("VLLM_PORT") == kept
    assert bool(caplog.records) == (value is not None and kept is None)
    assert envs.get_vllm_port() == (int(kept) if kept else None)
