"""The engine: vLLM inside this process's reach, with its own OpenAI application. The only importer of vllm, but for
serve.cpu_lora, which runs in vLLM's worker."""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import types
import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY
from prometheus_fastapi_instrumentator.middleware import PrometheusInstrumentatorMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.anthropic import api_router as anthropic
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.envs import enable_envs_cache
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.gc_utils import freeze_gc_heap
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineGenerateError
from vllm.v1.metrics.loggers import PrometheusStatLogger

from serve.config import EngineSettings
from serve.errors import AdapterUnavailable, EngineStartFailed
from serve.first_error import stop_at_first_error
from serve.misread import tell_misread, tell_misread_in
from serve.names import AdapterRevision
from serve.recorder import Finished
from serve.tokens import adding, counter

# On a CPU: no compilation (minutes of it for nothing), and a bounded KV cache, since vLLM would take half of
# the machine's memory for every replica.
_CPU_ARGS = ("--enforce-eager", "--kv-cache-memory-bytes", str(512 << 20))

# vLLM's own way to apply adapters on a CPU is slow, and wrong for the base model's requests beside them.
_CPU_WORKER = "serve.cpu_lora.CpuWorker"

_USAGE = UsageContext.OPENAI_API_SERVER

_NOT_OURS = (CORSMiddleware, PrometheusInstrumentatorMiddleware)

# Objects more than before until young ones are looked through; Python's 700 are those of a few tokens.
_GC_THRESHOLD = 10_000

_PROBE = "probe-"  # how the ids of our own requests begin
_MOST_KNOWN = 1 << 16  # requests whose adapter is remembered; vLLM tells nothing of those that are broken off

# Told what the engine says of each request that has ended.
Listener = Callable[[Finished], None]


class VllmEngine:
    """AsyncLLM and vLLM's FastAPI application around it; see serve.engine.Engine for the promises."""

    def __init__(self, engine: Any, api: Any) -> None:
        self._engine = engine
        self._api = api
        self._models = api.state.openai_serving_models
        self._requests: dict[AdapterRevision, LoRARequest] = {}
        self._next_id = 1

    @classmethod
    async def start(
        cls, settings: EngineSettings, finished: Listener = lambda _: None, traces: str | None = None
    ) -> VllmEngine:
        """Load the model; returns when it can generate. `traces` is where its spans go, over OTLP. Raises
        EngineStartFailed with vLLM's reason."""
        if traces:  # vLLM speaks gRPC otherwise
            os.environ.setdefault("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
        args = parse_args(settings, traces)
        adapters = _AdaptersOfRequests()
        try:
            config = AsyncEngineArgs.from_cli_args(args).create_engine_config(_USAGE)
            engine = _Engine.from_vllm_config(
                config, usage_context=_USAGE, stat_loggers=[_statistics(adapters, finished)]
            )
            engine.adapters = adapters
            if args.worker_extension_cls == _CPU_WORKER:
                await engine.collective_rpc("group_adapters")
        except Exception as error:
            raise EngineStartFailed(f"vLLM can't serve this: {' '.join(str(error).split())}") from error
        engine.generate, engine.encode = _counted(engine.generate), _counted(engine.encode)
        tasks = await engine.get_supported_tasks()
        api = build_app(args, tasks, engine.model_config)
        await init_app_state(engine, api.state, args, tasks)
        tell_misread(api, EngineGenerateError)
        tell_misread_in(anthropic)
        stop_at_first_error(api)
        # Which origins may call is the gateway's to say; by default vLLM lets all. It counts its answers here for a
        # route that nobody reaches.
        api.user_middleware = [it for it in api.user_middleware if it.cls not in _NOT_OURS]
        # vLLM's handler for a dead engine sets `.should_exit` on its HTTP server; here Ray Serve owns that.
        api.state.server = types.SimpleNamespace()
        # What vLLM does in processes of its own. With every token it asks for one of its settings, and the collector
        # would go through all that was imported, Ray included, again and again.
        enable_envs_cache()
        freeze_gc_heap()
        gc.set_threshold(_GC_THRESHOLD)
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
    def max_running_requests(self) -> int:
        return int(self._engine.vllm_config.scheduler_config.max_num_seqs)

    @property
    def running_requests(self) -> int:
        return int(self._engine.output_processor.get_num_unfinished_requests())

    @property
    def gives_prompt_logprobs(self) -> bool:
        return self._engine.vllm_config.lora_config is None

    @property
    def vocabulary_size(self) -> int:
        return int(self._engine.model_config.get_vocab_size())

    @property
    def context_tokens(self) -> int:
        return int(self._engine.model_config.max_model_len)

    async def logprobs(
        self, adapter: AdapterRevision | None, token_ids: Sequence[int], positions: Sequence[int]
    ) -> tuple[float, ...]:
        return tuple(await asyncio.gather(*(self._logprob(adapter, token_ids, it) for it in positions)))

    async def _logprob(self, adapter: AdapterRevision | None, token_ids: Sequence[int], position: int) -> float:
        # Not by `prompt_logprobs`, see serve.openai.wants_prompt_logprobs: the token is the only one that may be
        # generated, and logprobs are computed before that is enforced.
        token = token_ids[position]
        parameters = SamplingParams(
            max_tokens=1, temperature=0, logprobs=0, allowed_token_ids=[token], ignore_eos=True, detokenize=False
        )
        request = self._requests[adapter] if adapter else None
        prompt = {"prompt_token_ids": list(token_ids[:position])}
        answers = self._engine.generate(prompt, parameters, f"{_PROBE}{uuid.uuid4()}", lora_request=request)
        last = [answer async for answer in answers][-1]
        return float(last.outputs[0].logprobs[0][token].logprob)

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
        known = {it.lora_int_id for it in self._requests.values()}
        strangers = set(await self._engine.list_loras()) - known
        for number in strangers:
            await self._engine.remove_lora(number)
        return len(strangers)

    async def check_health(self) -> None:
        await self._engine.check_health()

    def shutdown(self, timeout_s: float) -> None:
        self._engine.shutdown(timeout=timeout_s)


_Generate = Callable[..., AsyncGenerator[Any, None]]


def _counted(generate: _Generate) -> _Generate:
    """`generate` or `encode` of an engine that adds what it makes to its caller's counter, if there is one."""

    def counted(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        answers, tokens = generate(*args, **kwargs), counter()
        if tokens is None:
            return answers
        parameters = kwargs.get("sampling_params") or (args[1] if len(args) > 1 else None)
        deltas = getattr(parameters, "output_kind", None) == RequestOutputKind.DELTA
        return adding(answers, tokens, deltas)

    return counted


class _AdaptersOfRequests(OrderedDict[str, str | None]):
    """The adapter's engine name by the id of a request; the oldest are forgotten."""

    def asked(self, request_id: str, request: LoRARequest | None) -> None:
        self[request_id] = request.lora_name if request else None
        if len(self) > _MOST_KNOWN:
            self.popitem(last=False)


class _Engine(AsyncLLM):
    """vLLM's statistics of a finished request name the request, not its adapter: remembered here."""

    adapters: _AdaptersOfRequests

    async def add_request(self, request_id: str, *args: Any, **options: Any) -> Any:
        self.adapters.asked(request_id, options.get("lora_request"))
        return await super().add_request(request_id, *args, **options)


def _statistics(adapters: _AdaptersOfRequests, finished: Listener) -> type[PrometheusStatLogger]:
    """vLLM's own Prometheus metrics, and `finished` for each request; once a request, nothing for a token."""

    class Statistics(PrometheusStatLogger):
        gauge_lora_info: Any

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            # It keeps a series for every set of adapters that ever ran together. serve.snapshot tells it instead.
            told, self.gauge_lora_info = self.gauge_lora_info, None
            if told is not None:
                REGISTRY.unregister(told)

        def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **options: Any) -> None:
            super().record(scheduler_stats, iteration_stats, *args, **options)
            for it in iteration_stats.finished_requests if iteration_stats else ():
                if it.request_id and not it.request_id.startswith(_PROBE):
                    finished(_told(it, adapters.get(it.request_id)))

    return Statistics


def _told(stats: Any, engine_name: str | None) -> Finished:
    return Finished(
        engine_name=engine_name,
        prompt_tokens=int(stats.num_prompt_tokens),
        cached_tokens=max(0, int(stats.num_cached_tokens)),
        generated_tokens=int(stats.num_generation_tokens),
        token_s=float(stats.mean_time_per_output_token),
    )


def parse_args(settings: EngineSettings, traces: str | None = None) -> argparse.Namespace:
    """Settings and the user's own vLLM arguments through vLLM's parser. Raises EngineStartFailed."""
    # A word that is cut short would pass by the names that the settings refuse.
    parser = make_arg_parser(_Parser(prog="vllm_args", allow_abbrev=False))
    args: argparse.Namespace = parser.parse_args(command_line(settings, traces))
    validate_parsed_serve_args(args)
    return args


def command_line(settings: EngineSettings, traces: str | None = None) -> list[str]:
    """Ours first, so that the user's arguments win where vLLM takes the last one."""
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
        *("--max-loras", str(settings.max_active_adapters)),
        # More than the pool ever holds: the engine must never evict by itself.
        *("--max-cpu-loras", str(settings.adapter_capacity + 1)),
        *(("--worker-extension-cls", _CPU_WORKER) if current_platform.is_cpu() else ()),
    ]


class _Parser(FlexibleArgumentParser):
    def error(self, message: str) -> Any:
        raise EngineStartFailed(f"vLLM refuses its arguments: {message}")
