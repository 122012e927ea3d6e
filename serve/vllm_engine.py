"""The engine: vLLM inside this process's reach, with its own OpenAI application. The only importer of vllm."""

from __future__ import annotations

import argparse
import types
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineGenerateError

from serve.config import EngineSettings
from serve.errors import AdapterUnavailable, EngineStartFailed
from serve.misread import tell_misread
from serve.names import AdapterRevision

# On a CPU: no compilation (minutes of it for nothing), and a bounded KV cache, since vLLM would take half of
# the machine's memory for every replica.
_CPU_ARGS = ("--enforce-eager", "--kv-cache-memory-bytes", str(512 << 20))

_USAGE = UsageContext.OPENAI_API_SERVER


class VllmEngine:
    """AsyncLLM and vLLM's FastAPI application around it; see serve.engine.Engine for the promises."""

    def __init__(self, engine: Any, api: Any) -> None:
        self._engine = engine
        self._api = api
        self._models = api.state.openai_serving_models
        self._requests: dict[AdapterRevision, LoRARequest] = {}
        self._next_id = 1

    @classmethod
    async def start(cls, settings: EngineSettings) -> VllmEngine:
        """Load the model; returns when it can generate. Raises EngineStartFailed with vLLM's reason."""
        args = parse_args(settings)
        try:
            config = AsyncEngineArgs.from_cli_args(args).create_engine_config(_USAGE)
            engine = AsyncLLM.from_vllm_config(config, usage_context=_USAGE)
        except Exception as error:
            raise EngineStartFailed(f"vLLM can't serve this: {' '.join(str(error).split())}") from error
        tasks = await engine.get_supported_tasks()
        api = build_app(args, tasks, engine.model_config)
        await init_app_state(engine, api.state, args, tasks)
        tell_misread(api, EngineGenerateError)
        # vLLM's handler for a dead engine sets `.should_exit` on its HTTP server; here Ray Serve owns that.
        api.state.server = types.SimpleNamespace()
        return cls(engine, api)

    @property
    def api(self) -> ASGIApp:
        api: ASGIApp = self._api
        return api

    @property
    def openapi(self) -> Mapping[str, Any]:
        document: Mapping[str, Any] = self._api.openapi()  # FastAPI makes it once
        return document

    @property
    def is_dead(self) -> bool:
        return bool(self._engine.errored)

    @property
    def running_requests(self) -> int:
        return int(self._engine.output_processor.get_num_unfinished_requests())

    @property
    def vocabulary_size(self) -> int:
        return int(self._engine.model_config.get_vocab_size())

    @property
    def context_tokens(self) -> int:
        return int(self._engine.model_config.max_model_len)

    async def logprobs(self, adapter: AdapterRevision | None, token_ids: Sequence[int]) -> tuple[float, ...]:
        parameters = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        request = self._requests[adapter] if adapter else None
        prompt = {"prompt_token_ids": list(token_ids)}
        answers = self._engine.generate(prompt, parameters, f"probe-{uuid.uuid4()}", lora_request=request)
        last = [answer async for answer in answers][-1]
        told = zip(token_ids[1:], last.prompt_logprobs[1:], strict=True)
        return tuple(float(logprobs[token].logprob) for token, logprobs in told)

    async def load_adapter(self, adapter: AdapterRevision, path: Path) -> None:
        # One that the engine lost keeps its number: requests that are running know it by that.
        request = self._requests.get(adapter) or LoRARequest(
            lora_name=adapter.engine_name, lora_int_id=self._next_id, lora_path=str(path)
        )
        self._next_id += 1
        try:
            await self._engine.add_lora(request)
        except Exception as error:
            raise AdapterUnavailable(f"The engine can't load {adapter}: {error}") from error
        self._requests[adapter] = request
        self._models.lora_requests[adapter.engine_name] = request

    async def unload_adapter(self, adapter: AdapterRevision) -> None:
        request = self._requests.pop(adapter)
        self._models.lora_requests.pop(adapter.engine_name, None)
        await self._engine.remove_lora(request.lora_int_id)

    async def resident_adapters(self) -> frozenset[AdapterRevision]:
        if self._engine.vllm_config.lora_config is None:
            return frozenset()  # an engine without adapters refuses the question
        loaded = await self._engine.list_loras()
        return frozenset(adapter for adapter, request in self._requests.items() if request.lora_int_id in loaded)

    async def unload_strangers(self) -> int:
        if self._engine.vllm_config.lora_config is None:
            return 0
        strangers = set(await self._engine.list_loras()) - {it.lora_int_id for it in self._requests.values()}
        for number in strangers:
            await self._engine.remove_lora(number)
        return len(strangers)

    async def check_health(self) -> None:
        await self._engine.check_health()

    def shutdown(self, timeout_s: float) -> None:
        self._engine.shutdown(timeout=timeout_s)


def parse_args(settings: EngineSettings) -> argparse.Namespace:
    """Settings and the user's own vLLM arguments through vLLM's parser. Raises EngineStartFailed."""
    parser = make_arg_parser(_Parser(prog="vllm_args"))
    args: argparse.Namespace = parser.parse_args(command_line(settings))
    validate_parsed_serve_args(args)
    return args


def command_line(settings: EngineSettings) -> list[str]:
    """Ours first, so that the user's arguments win where vLLM takes the last one."""
    platform = _CPU_ARGS if current_platform.is_cpu() else ()
    return [
        *("--model", str(settings.model_path), "--served-model-name", settings.model_name),
        *platform,
        *_lora_args(settings),
        *settings.vllm_args,
    ]


def _lora_args(settings: EngineSettings) -> list[str]:
    if settings.max_lora_rank == 0:
        return []
    return [
        "--enable-lora",
        *("--max-lora-rank", str(settings.max_lora_rank)),
        *("--max-loras", str(settings.max_active_adapters)),
        # One more than the pool ever holds: the engine must never evict by itself.
        *("--max-cpu-loras", str(settings.adapter_capacity + 1)),
    ]


class _Parser(FlexibleArgumentParser):
    def error(self, message: str) -> Any:
        raise EngineStartFailed(f"vLLM refuses its arguments: {message}")
