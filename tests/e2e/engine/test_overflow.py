"""An adapter whose answers are no numbers spoils nobody else's: on a real engine with a few KV blocks."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.convert import parts

pytestmark = pytest.mark.engine


def test_an_adapter_that_overflows_leaves_the_answers_of_the_base_model_as_they_were(tmp_path: Path) -> None:
    base = parts.save_base(tmp_path / "base", tied=True, hidden=128)
    adapter = parts.save_adapter(base, tmp_path / "adapter")
    weights = adapter / "adapter_model.safetensors"
    save_file({name: tensor * 1e38 for name, tensor in load_file(weights).items()}, weights)

    command = [sys.executable, "-m", "tests.e2e.engine.overflow", base, adapter]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stderr[-4000:]
    logprobs = json.loads(result.stdout.splitlines()[-1])
    assert not all(math.isfinite(value) for row in logprobs["overflowing"] for value in row)
    for before, after in zip(logprobs["before"], logprobs["after"], strict=True):
        assert after == pytest.approx(before, abs=1e-3)
