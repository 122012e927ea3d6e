"""The inference engine: vLLM's AsyncLLM and its OpenAI application, in this process."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.envs import enable_envs_cache
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.gc_utils import freeze_gc_heap
from vllm.v1.engine.async_llm import AsyncLLM

from serve.engine.grammars.limits import GrammarLimits
from serve.engine.grammars.vllm_grammars import EngineGrammars
from serve.engine.prompt_size import PromptSize, measure
from serve.engine.start_failure import engine_failures, refusals
from serve.engine.vllm_patches import (
    PROBE_ID_PREFIX,
    AdapterNames,
    FinishedListener,
    count_generated_tokens,
    engine_class,
    patch_application,
    stat_logger_class,
)
from serve.errors import AdapterUnavailable, EngineRefused
from serve.names import AdapterRevision
from serve.settings import RESERVED_SLOTS, EngineSettings

# On a CPU: without compilation, which takes minutes and gains nothing, and with a bounded KV cache, because vLLM would
# take half of the machine's memory for every replica.
_CPU_ARGS = ("--enforce-eager", "--kv-cache-memory-bytes", str(512 << 20))

# vLLM's own way to apply adapters on a CPU is slow, and wrong for requests of the base model in the same batch.
_CPU_WORKER, _WORKER = "serve.engine.cpu_lora.CpuWorker", "serve.engine.worker.Worker"

_USAGE = UsageContext.OPENAI_API_SERVER
_PORT_VARIABLE = "VLLM_PORT"

# For checks of Graft's own, which run one after the other and must not wait for requests of callers.
_RESERVED_REQUESTS = 1

# The number of new objects after which Python's garbage collector examines the young generation. A few tokens create
# more than Python's default, 700.
_GC_THRESHOLD = 10_000

logger = logging.getLogger(__name__)


class VllmEngine:
    """Implements serve.engine.protocol.Engine, which describes what each method promises."""

    def __init__(self, engine: Any, api: Any, prompt_size: PromptSize) -> None:
        self._engine = engine
        self._api = api
        self._prompt_size = prompt_size
        self._models = api.state.openai_serving_models
        self._lora_requests: dict[AdapterRevision, LoRARequest] = {}
        self._next_id = 1

    @classmethod
    async def start(
        cls, settings: EngineSettings, finished: FinishedListener = lambda _: None, traces: str | None = None
    ) -> VllmEngine:
        """Loads the model and returns when it can generate. `finished` is called for each finished request; `traces`
        is an OTLP endpoint for vLLM's spans. Raises EngineStartFailed with vLLM's reason, and EngineRefused if another
        attempt would end the same."""
        if traces:  # vLLM's default is gRPC
            os.environ.setdefault("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
        drop_service_link()
        args = parse_args(settings, traces)
        engine = await _start_engine(args, finished, GrammarLimits.of(settings))
        api = await _build_application(engine, args)
        prompt_size = await measure(api)
        _tune_process()
        return cls(engine, api, prompt_size)

    @property
    def api(self) -> ASGIApp:
        api: ASGIApp = self._api
        return api

    @property
    def openapi(self) -> Mapping[str, Any]:
        document: Mapping[str, Any] = self._api.openapi()  # FastAPI caches it
        return document

    @property
    def is_dead(self) -> bool:
        return bool(self._engine.errored)

    @property
    def max_running_requests(self) -> int:
        return max(1, int(self._engine.vllm_config.scheduler_config.max_num_seqs) - _RESERVED_REQUESTS)

    @property
    def running_requests(self) -> int:
        return int(self._engine.output_processor.get_num_unfinished_requests())

    @property
    def prompt_size(self) -> PromptSize:
        return self._prompt_size

    @property
    def supports_prompt_logprobs(self) -> bool:
        return self._engine.vllm_config.lora_config is None

    @property
    def runs_tools(self) -> bool:
        responses = self._api.state.openai_serving_responses
        return responses is not None and responses.tool_server is not None

    @property
    def vocabulary_size(self) -> int:
        return int(self._engine.model_config.get_vocab_size())

    @property
    def context_tokens(self) -> int:
        return int(self._engine.model_config.max_model_len)

    async def logprobs(
        self, adapter: AdapterRevision | None, token_ids: Sequence[int], positions: Sequence[int]
    ) -> tuple[float, ...]:
        values = await asyncio.gather(*(self._logprob(adapter, token_ids, position) for position in positions))
        extension = self._engine.vllm_config.parallel_config.worker_extension_cls
        if not all(map(math.isfinite, values)) and extension in (_CPU_WORKER, _WORKER):
            await self._engine.collective_rpc("clear_nonfinite")
        return tuple(values)

    async def _logprob(self, adapter: AdapterRevision | None, token_ids: Sequence[int], position: int) -> float:
        # Not by `prompt_logprobs`; see serve.gateway.body.wants_prompt_logprobs. The token is the only one that may be
        # generated, and vLLM computes log-probabilities before it enforces that.
        token = token_ids[position]
        parameters = SamplingParams(
            max_tokens=1, temperature=0, logprobs=0, allowed_token_ids=[token], ignore_eos=True, detokenize=False
        )
        request = self._lora_requests[adapter] if adapter else None
        prompt = {"prompt_token_ids": list(token_ids[:position])}
        outputs = self._engine.generate(prompt, parameters, f"{PROBE_ID_PREFIX}{uuid.uuid4()}", lora_request=request)
        last = [output async for output in outputs][-1]
        return float(last.outputs[0].logprobs[0][token].logprob)

    async def load_adapter(self, adapter: AdapterRevision, path: Path) -> None:
        # An adapter that the engine lost keeps its id, because running requests refer to the adapter by it.
        request = self._lora_requests.get(adapter) or LoRARequest(
            lora_name=adapter.engine_name, lora_int_id=self._next_id, lora_path=str(path)
        )
        self._next_id += 1
        try:
            await self._engine.add_lora(request)
        except Exception as error:
            raise AdapterUnavailable(f"The engine can't load {adapter}: {error}") from error
        self._lora_requests[adapter] = request
        self._models.lora_requests[adapter.engine_name] = request

    async def unload_adapter(self, adapter: AdapterRevision) -> None:
        request = self._lora_requests.pop(adapter)
        self._models.lora_requests.pop(adapter.engine_name, None)
        await self._engine.remove_lora(request.lora_int_id)

    async def resident_adapters(self) -> frozenset[AdapterRevision]:
        if self._engine.vllm_config.lora_config is None:
            return frozenset()  # `list_loras` fails in an engine without adapters
        loaded = await self._engine.list_loras()
        return frozenset(adapter for adapter, request in self._lora_requests.items() if request.lora_int_id in loaded)

    async def unload_unknown(self) -> int:
        if self._engine.vllm_config.lora_config is None:
            return 0
        known_ids = {request.lora_int_id for request in self._lora_requests.values()}
        unknown_ids = set(await self._engine.list_loras()) - known_ids
        for lora_id in unknown_ids:
            await self._engine.remove_lora(lora_id)
        return len(unknown_ids)

    async def check_health(self) -> None:
        await self._engine.check_health()

    def shutdown(self, timeout_s: float) -> None:
        self._engine.shutdown(timeout=timeout_s)


async def _start_engine(args: argparse.Namespace, finished: FinishedListener, limits: GrammarLimits) -> AsyncLLM:
    """Raises EngineStartFailed or EngineRefused with vLLM's reason."""
    adapter_names = AdapterNames()
    with refusals():
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config(_USAGE)
    grammars = EngineGrammars(config, limits)
    with engine_failures():
        engine = engine_class(adapter_names, grammars).from_vllm_config(
            config, usage_context=_USAGE, stat_loggers=[stat_logger_class(adapter_names, finished)]
        )
        if args.worker_extension_cls == _CPU_WORKER:
            await engine.collective_rpc("group_adapters")
    await grammars.start()
    count_generated_tokens(engine)
    return engine


async def _build_application(engine: AsyncLLM, args: argparse.Namespace) -> Any:
    """vLLM's FastAPI application on the engine, with Graft's changes. Raises EngineRefused with vLLM's reason, such as
    a tool parser that the tokenizer has no tokens for."""
    tasks = await engine.get_supported_tasks()
    with refusals():
        api = build_app(args, tasks, engine.model_config)
        await init_app_state(engine, api.state, args, tasks)
    patch_application(api)
    return api


def _tune_process() -> None:
    """Tunes this process as vLLM's own server tunes its process. Otherwise vLLM would read an environment variable with
    every token, and Python's garbage collector would examine all imported objects, those of Ray included, again and
    again."""
    enable_envs_cache()
    freeze_gc_heap()
    gc.set_threshold(_GC_THRESHOLD)


def parse_args(settings: EngineSettings, traces: str | None = None) -> argparse.Namespace:
    """The settings and the user's own vLLM arguments, parsed by vLLM. Raises EngineRefused."""
    # Without abbreviations, which would bypass the names that the settings refuse.
    parser = make_arg_parser(_Parser(prog="vllm_args", allow_abbrev=False))
    args: argparse.Namespace = parser.parse_args(command_line(settings, traces))
    with refusals():
        validate_parsed_serve_args(args)
    return args


def drop_service_link() -> None:
    """Kubernetes sets VLLM_PORT=tcp://… in every container beside a Service named `vllm`, and vLLM, which expects a
    number there, would not start."""
    port = os.environ.get(_PORT_VARIABLE)
    if port is not None and not port.isdecimal():
        logger.warning("Warning: %s=%r is not a port, and is ignored.", _PORT_VARIABLE, port)
        del os.environ[_PORT_VARIABLE]


def command_line(settings: EngineSettings, traces: str | None = None) -> list[str]:
    """Graft's arguments first: where an argument is repeated, vLLM takes the last one, which is the user's."""
    platform = _CPU_ARGS if current_platform.is_cpu() else ()
    return [
        *("--model", str(settings.model_path), "--served-model-name", settings.model_name),
        *platform,
        *_lora_args(settings),
        *(("--otlp-traces-endpoint", traces) if traces else ()),
        *settings.vllm_args,
    ]


def _lora_args(settings: EngineSettings) -> list[str]:
    if settings.max_lora_rank == 0:
        return []
    return [
        "--enable-lora",
        *("--max-lora-rank", str(settings.max_lora_rank)),
        *("--max-loras", str(settings.max_active_adapters + RESERVED_SLOTS)),
        # One more than the pool ever holds, so that the engine never evicts an adapter itself.
        *("--max-cpu-loras", str(settings.adapter_capacity + 1)),
        *("--worker-extension-cls", _CPU_WORKER if current_platform.is_cpu() else _WORKER),
    ]


class _Parser(FlexibleArgumentParser):
    def error(self, message: str) -> Any:
        raise EngineRefused(f"vLLM refuses its arguments: {message}")
