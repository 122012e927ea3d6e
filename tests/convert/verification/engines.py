"""Engines that do not answer."""

from __future__ import annotations

import sys
from pathlib import Path

from convert.verification.client import EngineClient

WITHOUT_VLLM = Path(sys.base_prefix) / "bin" / "python3"
NOWHERE = EngineClient(Path("/nonexistent/vllm.sock"), 1)
