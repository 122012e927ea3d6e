"""A start that can't get better ends at its first attempt, with vLLM's own reason."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from examples.server import start, stop
from serve.deployment.ports import free_port
from tests.e2e.conftest import Story


def test_a_parser_without_its_tokens_ends_the_start_and_a_kubernetes_service_does_not(
    story: Story, tmp_path: Path
) -> None:
    """With this VLLM_PORT, which Kubernetes sets beside a Service named `vllm`, the engine itself would not start."""
    state, log = tmp_path / "state", tmp_path / "log"
    with log.open("w") as output:
        server = start(
            [
                *(sys.executable, "-m", "serve", "run", str(story.artifacts["french"]), "--state", str(state)),
                *("--port", str(free_port()), "--metrics-port", "0", "--log-format", "text"),
                *("--vllm-arg=--max-model-len=2048", f"--vllm-arg=--kv-cache-memory-bytes={64 << 20}"),
                *("--vllm-arg=--enable-auto-tool-choice", "--vllm-arg=--tool-call-parser=jamba"),
            ],
            output,
            os.environ | {"VLLM_PORT": "tcp://10.0.0.7:8000", "COLUMNS": "300"},
        )
    try:
        assert server.wait(300) == 1
    finally:
        stop(server)

    printed = " ".join(log.read_text().split())
    reason = "The engine did not start: vLLM can't serve this: --tool-call-parser jamba cannot be used"
    assert f"error[engine_start_failed]: {reason}" in printed
    assert "Jamba Tool parser could not locate tool calls start/end tokens in the tokenizer!" in printed
    [replica] = (state / "logs").glob("*.log")
    assert "VLLM_PORT='tcp://10.0.0.7:8000' is not a port" in replica.read_text()
