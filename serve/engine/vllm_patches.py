"""Everything that Graft changes in vLLM's engine and in its OpenAI application.

Changes of vLLM's worker, for adapters on a CPU, are in serve.engine.cpu_lora, because the worker may be another
process. Every function raises EngineStartFailed where it finds nothing to change. The names that the changes depend on
are listed in serve.engine.vllm_contract.
"""

from __future__ import annotations

import importlib.util
import logging
import traceback
import types
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from importlib import metadata
from typing import Any

from prometheus_client import REGISTRY
from prometheus_fastapi_instrumentator.middleware import PrometheusInstrumentatorMiddleware
from pydantic_core import ValidationError
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from vllm.entrypoints.anthropic import api_router as anthropic_router
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import VLLMUnprocessableEntityError, VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineGenerateError
from vllm.v1.metrics.loggers import PrometheusStatLogger

from serve.engine.api_errors import GRAMMAR_FIELD, EngineFault
from serve.engine.fastapi_patches import (
    describe_invalid_bodies,
    described_error,
    exception_handler_of,
    not_found,
    remove_middleware,
    set_exception_handlers,
    validate_fail_fast,
)
from serve.engine.grammars.vllm_grammars import EngineGrammars, GrammarTooCostly
from serve.engine.token_counter import count_outputs, current_counter
from serve.engine.vllm_contract import BODY_MODULES
from serve.errors import EngineStartFailed
from serve.observability.recorder import Finished

# Called with the engine's report of each finished request.
FinishedListener = Callable[[Finished], None]

PROBE_ID_PREFIX = "probe-"  # of requests that Graft itself sends to the engine; they are not reported

_MAX_REMEMBERED_REQUESTS = 1 << 16  # vLLM reports nothing of an aborted request, so these are never removed
# Among the arguments of `add_request` after the request's id.
_PARAMETERS_POSITION, _LORA_REQUEST_POSITION = 1, 3
_CLIENT_ERRORS = (AssertionError, AttributeError, IndexError, KeyError)

logger = logging.getLogger(__name__)


class AdapterNames(OrderedDict[str, str | None]):
    """The adapter's engine name by request id, None for the base model; the oldest requests are forgotten."""

    def remember(self, request_id: str, request: LoRARequest | None) -> None:
        self[request_id] = request.lora_name if request else None
        if len(self) > _MAX_REMEMBERED_REQUESTS:
            self.popitem(last=False)


def engine_class(adapter_names: AdapterNames, grammars: EngineGrammars) -> type[AsyncLLM]:
    """vLLM's engine, which remembers the adapter of each request: vLLM's statistics of a finished request have the
    request's id, but not its adapter. And it refuses a grammar that costs too much, before vLLM reads it."""

    class Engine(AsyncLLM):
        async def add_request(self, request_id: str, *args: Any, **options: Any) -> Any:
            has_parameters = len(args) > _PARAMETERS_POSITION
            await grammars.check(args[_PARAMETERS_POSITION] if has_parameters else options.get("params"))
            is_positional = len(args) > _LORA_REQUEST_POSITION
            adapter_names.remember(
                request_id, args[_LORA_REQUEST_POSITION] if is_positional else options.get("lora_request")
            )
            return await super().add_request(request_id, *args, **options)

        def shutdown(self, timeout: float | None = None) -> None:
            grammars.close()
            super().shutdown(timeout)

    return Engine


def stat_logger_class(adapter_names: AdapterNames, finished: FinishedListener) -> type[PrometheusStatLogger]:
    """vLLM's own Prometheus metrics, which also call `finished` once for each request, and never for a token."""

    class StatLogger(PrometheusStatLogger):
        gauge_lora_info: Any

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            if not hasattr(self, "gauge_lora_info"):
                raise vllm_not_found("PrometheusStatLogger.gauge_lora_info", "its series would grow without a limit")
            # This gauge has a series for every set of adapters that ever ran together. Graft's MetricsCollector exports
            # the resident adapters instead.
            gauge, self.gauge_lora_info = self.gauge_lora_info, None
            if gauge is not None:
                REGISTRY.unregister(gauge)

        def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **options: Any) -> None:
            super().record(scheduler_stats, iteration_stats, *args, **options)
            for request in iteration_stats.finished_requests if iteration_stats else ():
                if request.request_id and not request.request_id.startswith(PROBE_ID_PREFIX):
                    finished(_finished(request, adapter_names.get(request.request_id)))

    return StatLogger


def _finished(stats: Any, engine_name: str | None) -> Finished:
    return Finished(
        engine_name=engine_name,
        prompt_tokens=int(stats.num_prompt_tokens),
        cached_tokens=max(0, int(stats.num_cached_tokens)),
        generated_tokens=int(stats.num_generation_tokens),
        token_s=float(stats.mean_time_per_output_token),
    )


def count_generated_tokens(engine: AsyncLLM) -> None:
    """Makes `generate` and `encode` add their tokens to the counter of the caller's context, if it has one."""
    engine.generate, engine.encode = _counted(engine.generate), _counted(engine.encode)


_Generate = Callable[..., AsyncGenerator[Any, None]]


def _counted(generate: _Generate) -> _Generate:
    def counted(*args: Any, **options: Any) -> AsyncGenerator[Any, None]:
        outputs, tokens = generate(*args, **options), current_counter()
        if tokens is None:
            return outputs
        parameters = options.get("sampling_params") or (args[1] if len(args) > 1 else None)
        deltas = getattr(parameters, "output_kind", None) == RequestOutputKind.DELTA
        has_grammar = getattr(parameters, "structured_outputs", None) is not None
        return count_outputs(outputs, tokens, deltas, _check_grammar if has_grammar else lambda _: None, _fault_of)

    return counted


def _check_grammar(first: Any) -> None:
    """The engine core compiles grammars, after vLLM checked them. A request whose grammar allows no text ends there at
    its first token with nothing but the reason `error`: vLLM answers 500, or after 200 if it streams. Raises vLLM's
    error for a client."""
    if any(sequence.finish_reason == "error" and len(sequence.token_ids) <= 1 for sequence in first.outputs):
        raise VLLMValidationError(
            "The engine can't compile the schema or grammar of this request: it is too large, or may refer to itself "
            "without an end.",
            parameter=GRAMMAR_FIELD,
        )


def _fault_of(error: Exception) -> EngineFault:
    described = create_error_response(error).error
    named = {"code": error.code} if isinstance(error, GrammarTooCostly) else {}
    return EngineFault(int(described.code), {"message": described.message, "param": described.param, **named})


def patch_application(api: Any) -> None:
    """Everything that is changed in vLLM's FastAPI application, before it answers its first request."""
    map_client_errors_to_400(api, EngineGenerateError)
    map_overflows_to_400(anthropic_router)
    hide_values(VLLMValidationError)
    hide_values(VLLMUnprocessableEntityError)
    validate_fail_fast(api)
    describe_invalid_bodies(api)
    # The gateway decides which origins may call, and vLLM allows all of them by default. vLLM's HTTP metrics are
    # offered on a route that isn't public.
    remove_middleware(api, CORSMiddleware, PrometheusInstrumentatorMiddleware)
    # vLLM's handler for a dead engine sets `should_exit` of its HTTP server. Here the HTTP server is Ray Serve's.
    api.state.server = types.SimpleNamespace()


def hide_values(error: type[Exception]) -> None:
    """Leaves out of the text of vLLM's errors what the client sent. vLLM appends `(parameter=…, value=…)`, which may be
    as long as a body; the parameter is a field of the answer anyway."""
    if "__str__" not in vars(error):
        raise vllm_not_found(f"{error.__name__}.__str__", "errors may repeat what the client sent")
    error.__str__ = Exception.__str__  # type: ignore[method-assign]


def map_client_errors_to_400(api: Any, generate_error: type[Exception]) -> None:
    """Answers 400 for a request that vLLM 0.32 answers with 500, though the client can correct it. vLLM raises
    `generate_error` if it can't send a request to the engine core; its cause is the original error.

    The cases were found by fuzzing:

    - A body in which vLLM's code, after it validated the body, expects what isn't there. Examples are the history of a
      `/v1/responses` request with an assistant message that has no content or is a refusal (`item.content[0].text`), a
      part of a message that is no object (`assert isinstance(part, dict)`), and a value that vLLM's validators read
      before pydantic checked its type (`structured_outputs: [{}]`).
    - A number that the message to the engine core can't hold, as one of more than 64 bits somewhere inside a body.

    Every other error stays the 500 that it is.
    """
    for module in BODY_MODULES:
        if importlib.util.find_spec(module) is None:
            raise vllm_not_found(f"the module {module}", "its errors can't be distinguished from others")
    handle_generate_error = exception_handler_of(api, generate_error)

    async def answer_generate_error(request: Request, error: Exception) -> Response:
        if (overflow := _overflow(error)) is None:
            return await handle_generate_error(request, error)
        return _bad_request(str(overflow))

    set_exception_handlers(
        api, {**dict.fromkeys(_CLIENT_ERRORS, _answer_client_error), generate_error: answer_generate_error}
    )


def map_overflows_to_400(router: Any) -> None:
    """The same for numbers that are too large, and for bodies that pydantic finds invalid late, in the module of
    Anthropic's routes. It doesn't use the application's exception handlers: it turns every exception into a response
    with its function `create_error_response`."""
    create = getattr(router, "create_error_response", None)
    if create is None:
        raise vllm_not_found(f"{router}.create_error_response", "a number that is too large would be answered with 500")

    def create_error_response(error: Any, *args: Any, **options: Any) -> Any:
        if isinstance(error, ValidationError):
            error = described_error(error.errors())["message"]
        return create(_overflow(error) or error, *args, **options)

    router.create_error_response = create_error_response


def _overflow(error: Any) -> OverflowError | None:
    """The client's error, if a number that is too large kept a request from being sent to the engine core."""
    cause = getattr(error, "__cause__", None)
    if not isinstance(cause, OverflowError):
        return None
    return OverflowError(f"A number in this request is too large for the engine: {cause}.")


async def _answer_client_error(_: Request, error: Exception) -> Response:
    if not _reads_bodies(_module_that_raised(error)):
        raise error
    logger.warning("vLLM could not read a request", exc_info=error)
    # What Python says of the others is of no use to a client.
    reason = f" ({error})" if isinstance(error, AssertionError) and str(error) else ""
    return _bad_request(
        f"The engine can't read this request: a message without text, or with a part that is no object?{reason}"
    )


def _reads_bodies(module: str) -> bool:
    """Whether a module does nothing but read request bodies. Then the client's body caused its errors."""
    return module in BODY_MODULES or (module.startswith("vllm.entrypoints.") and module.endswith(".protocol"))


def _module_that_raised(error: Exception) -> str:
    """The innermost module outside of pydantic, which itself raises the error for an attribute that a model lacks."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((module for module in reversed(modules) if not module.startswith("pydantic")), "")


def _bad_request(message: str) -> JSONResponse:
    """In the shape of vLLM's errors."""
    error = {"message": message, "type": "BadRequestError", "param": None, "code": 400}
    return JSONResponse({"error": error}, status_code=400)


def vllm_not_found(target: str, consequence: str) -> EngineStartFailed:
    return not_found(metadata.packages_distributions()["vllm"][0], target, consequence)
