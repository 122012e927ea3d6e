"""Prints log-probabilities of a base model before and after an adapter that overflows was asked.

python -m tests.e2e.engine.overflow MODEL ADAPTER
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from serve.deployment.ray_environment import environment
from serve.names import AdapterRevision
from serve.settings import EngineSettings, GatewaySettings, ServeSettings

PROMPTS = [[(17 + 31 * number * step) % 256 for number in range(40)] for step in range(1, 9)]
POSITIONS = (8, 20, 39)


async def main(model: Path, adapter_path: Path) -> None:
    # So few blocks that each prompt gets those of the one before.
    arguments = ("--max-model-len=256", "--num-gpu-blocks-override=4")
    engine_settings = EngineSettings(
        model_path=model, model_name="m", fingerprint="0" * 64, max_lora_rank=8, vllm_args=arguments
    )
    os.environ |= environment(
        Path(), ServeSettings(engine=engine_settings, gateway=GatewaySettings(admin_tokens={}), state_dir=Path())
    )
    from serve.engine.vllm_engine import VllmEngine

    engine = await VllmEngine.start(engine_settings)
    adapter = AdapterRevision("overflowing", "a" * 64)
    await engine.load_adapter(adapter, adapter_path)
    before = [await engine.logprobs(None, prompt, POSITIONS) for prompt in PROMPTS]
    overflowing = [await engine.logprobs(adapter, prompt, POSITIONS) for prompt in PROMPTS]
    after = [await engine.logprobs(None, prompt, POSITIONS) for prompt in PROMPTS]
    print(json.dumps({"before": before, "overflowing": overflowing, "after": after}))
    engine.shutdown(5)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2])))
