"""Settings of the engine and of the adapters that it holds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt

from convert.artifact import VLLM_LORA_RANKS, Name, Sha256
from serve.settings.frozen import FrozenSettings

# Arguments of vLLM that would change what Graft itself sets (the model, its names, its adapters), let others reach the
# engine past the gateway, or run code that came with a model. serve.engine.vllm_contract names them too.
REFUSED_VLLM_ARGS = frozenset({
    "--allow-credentials", "--api-key", "--code-revision", "--config", "--enable-lora", "--hf-overrides",
    "--host", "--lora-modules", "--max-cpu-loras", "--max-lora-rank", "--max-loras", "--middleware", "--model",
    "--port", "--root-path", "--served-model-name", "--tokenizer", "--trust-remote-code", "--uds",
    "--worker-extension-cls",
})  # fmt: skip
# Engine slots beside `max_active_adapters`: in it new revisions are checked while requests hold all others.
RESERVED_SLOTS = 1
# The name of an argument without what follows it: vLLM's parser takes `--a_b=1`, `--a-b.key=1` and `--a-b+ 1` too.
_ARGUMENT = re.compile(r"--[\w-]*")


def _without_reserved(args: tuple[str, ...]) -> tuple[str, ...]:
    names = {match[0].replace("_", "-") for arg in args if (match := _ARGUMENT.match(arg))}
    if refused := sorted(REFUSED_VLLM_ARGS & names):
        raise ValueError(f"{', '.join(refused)} can't be passed to vLLM: Graft sets it, or it would be unsafe")
    return args


# What a caller of the admin API may set: sizes and switches. Others of vLLM's arguments import modules, read files, or
# send data elsewhere, which is for whoever starts the server.
POOL_VLLM_ARGS = frozenset({
    "--block-size", "--dtype", "--enable-auto-tool-choice", "--enable-chunked-prefill", "--enable-prefix-caching",
    "--enforce-eager", "--gpu-memory-utilization", "--kv-cache-dtype", "--kv-cache-memory-bytes", "--max-logprobs",
    "--max-model-len", "--max-num-batched-tokens", "--max-num-seqs", "--no-enable-chunked-prefill",
    "--no-enable-prefix-caching", "--reasoning-parser", "--seed", "--tool-call-parser",
})  # fmt: skip


def _harmless(args: tuple[str, ...]) -> tuple[str, ...]:
    names = [match[0].replace("_", "-") if (match := _ARGUMENT.match(arg)) else arg for arg in args]
    if refused := sorted({name for name in names if name not in POOL_VLLM_ARGS}):
        raise ValueError(
            f"{', '.join(refused)} can't be set for one pool; what can: {', '.join(sorted(POOL_VLLM_ARGS))}. Each is "
            "one argument with its value, as --max-model-len=4096"
        )
    return args


PoolVllmArgs = Annotated[tuple[str, ...], AfterValidator(_harmless)]
VllmArgs = Annotated[tuple[str, ...], AfterValidator(_without_reserved)]


class EngineSettings(FrozenSettings):
    """What one engine serves, and how much room its adapters get."""

    model_path: Path = Field(description="Directory of the base model, or of the merged model.")
    model_name: Name = Field(description="What clients write as `model` to reach it without an adapter.")
    fingerprint: Sha256 = Field(description="Identity of the base model; adapters must be made for it.")
    max_lora_rank: Annotated[int, Field(ge=0, le=512)] = Field(
        16, description="Largest adapter rank; 0 runs the engine without adapters."
    )
    max_active_adapters: PositiveInt = Field(
        4, description="Engine slots: different adapters that run at a time and that one batch may mix."
    )
    max_resident_adapters: PositiveInt = Field(16, description="Adapters that an engine keeps in host memory.")
    max_grammar_bytes: PositiveInt = Field(
        256 << 10, description="Of the schema, grammar, regex or choices of one request; larger ones get a 400."
    )
    max_grammar_compile_s: PositiveFloat = Field(
        20.0, description="CPU time to compile one grammar, on trial outside of the engine; costlier ones get a 400."
    )
    max_grammar_step_s: PositiveFloat = Field(
        0.25, description="CPU time to find the tokens that a grammar allows next, which every request waits for."
    )
    vllm_args: VllmArgs = Field((), description="Passed to vLLM's own argument parser as they are.")

    @property
    def adapter_capacity(self) -> int:
        """Adapters the engine holds: one more than may run, so that a publish finds a place under any load."""
        return max(self.max_resident_adapters, self.max_active_adapters + 1)


def supported_rank(rank: int) -> int:
    """The smallest rank of vLLM's list that holds adapters of `rank`; raises ValueError above the largest."""
    for supported in VLLM_LORA_RANKS:
        if rank <= supported:
            return supported
    raise ValueError(f"rank {rank} is above {VLLM_LORA_RANKS[-1]}, the largest that vLLM serves")
