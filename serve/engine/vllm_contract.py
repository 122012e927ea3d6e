"""The names of vLLM that Graft imports, overrides, replaces or reads, in the notation of tests/contracts/contract.py.

vLLM documents almost none of them as stable. tests/contracts/test_vllm.py compares this table with the installed
version, and fails for a name that serve/engine uses and this table doesn't have.
"""

from __future__ import annotations

from collections.abc import Mapping

# Modules that turn a request body into a conversation or a prompt; see serve.engine.vllm_patches.
BODY_MODULES = ("vllm.entrypoints.openai.responses.utils", "vllm.renderers.chat_utils")

# Variables and arguments that Graft sets, refuses to pass on, or lets a pool have. vLLM ignores an environment variable
# that it does not know, and refuses an argument that it does not know; an argument that got another name would be
# passed on.
ENVIRONMENT: Mapping[str, tuple[str, ...]] = {
    "vllm.envs": (
        *("VLLM_CONFIGURE_LOGGING", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_HOST_IP"),
        *("VLLM_LOGGING_LEVEL", "VLLM_MAX_N_SEQUENCES", "VLLM_NO_USAGE_STATS", "VLLM_PORT"),
        *("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_API_KEY"),  # of vLLM's own server: benchmarks, verification
    ),
}

ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "vllm.engine.arg_utils:AsyncEngineArgs": (
        *("model", "served_model_name", "enforce_eager", "kv_cache_memory_bytes", "otlp_traces_endpoint"),
        *("enable_lora", "max_lora_rank", "max_loras", "max_cpu_loras", "worker_extension_cls"),
        *("code_revision", "hf_overrides", "tokenizer", "trust_remote_code"),
        *("block_size", "dtype", "enable_chunked_prefill", "enable_prefix_caching", "gpu_memory_utilization"),
        *("kv_cache_dtype", "max_logprobs", "max_model_len", "max_num_batched_tokens", "max_num_seqs"),
        *("reasoning_parser", "seed"),
    ),
    "vllm.entrypoints.launchers.cli_args:FrontendArgs": (
        *("allow_credentials", "api_key", "host", "lora_modules", "middleware", "port", "root_path", "uds"),
        *("enable_auto_tool_choice", "tool_call_parser"),
    ),
    "vllm.utils.argparse_utils:text --config": (),
}

START: Mapping[str, tuple[str, ...]] = {
    "vllm.engine.arg_utils:AsyncEngineArgs.create_engine_config": ("usage_context", "/"),
    "vllm.engine.arg_utils:AsyncEngineArgs.from_cli_args": ("args", "/"),
    "vllm.entrypoints.launchers.api_server.app_state:init_app_state": (
        *("engine_client", "state", "args", "supported_tasks", "/"),
    ),
    "vllm.entrypoints.launchers.app:build_app": ("args", "supported_tasks", "model_config", "/"),
    "vllm.entrypoints.launchers.cli_args:make_arg_parser": ("parser", "/"),
    "vllm.entrypoints.launchers.cli_args:validate_parsed_serve_args": ("args", "/"),
    "vllm.envs:enable_envs_cache": (),
    "vllm.platforms:current_platform": (),
    "vllm.platforms.interface:Platform.is_cpu": (),
    "vllm.usage.usage_lib:UsageContext": ("OPENAI_API_SERVER",),
    "vllm.utils.argparse_utils:FlexibleArgumentParser.error": ("message",),
    "vllm.utils.gc_utils:freeze_gc_heap": (),
}

ENGINE: Mapping[str, tuple[str, ...]] = {
    "vllm.v1.engine.async_llm:AsyncLLM": ("errored", "model_config", "output_processor", "vllm_config"),
    "vllm.v1.engine.async_llm:AsyncLLM.add_lora": ("lora_request", "/"),
    "vllm.v1.engine.async_llm:AsyncLLM.add_request": (
        *("request_id", "prompt", "params", "arrival_time", "lora_request", "/"),
    ),
    "vllm.v1.engine.async_llm:AsyncLLM.check_health": (),
    "vllm.v1.engine.async_llm:AsyncLLM.collective_rpc": ("method", "/"),
    "vllm.v1.engine.async_llm:AsyncLLM.encode": ("prompt", "pooling_params", "request_id", "/"),
    "vllm.v1.engine.async_llm:AsyncLLM.from_vllm_config": ("vllm_config", "/", "usage_context", "stat_loggers"),
    "vllm.v1.engine.async_llm:AsyncLLM.generate": ("prompt", "sampling_params", "request_id", "/", "lora_request"),
    "vllm.v1.engine.async_llm:AsyncLLM.get_supported_tasks": (),
    "vllm.v1.engine.async_llm:AsyncLLM.list_loras": (),
    "vllm.v1.engine.async_llm:AsyncLLM.remove_lora": ("lora_id", "/"),
    "vllm.v1.engine.async_llm:AsyncLLM.shutdown": ("timeout",),
    "vllm.v1.engine.async_llm:uses self.add_request": (),
    "vllm.v1.engine.output_processor:OutputProcessor.get_num_unfinished_requests": (),
    "vllm.config:VllmConfig": (
        *("lora_config", "model_config", "parallel_config", "scheduler_config", "structured_outputs_config"),
    ),
    "vllm.config:SchedulerConfig": ("max_num_seqs",),
    "vllm.config:ModelConfig": ("max_model_len", "skip_tokenizer_init"),
    "vllm.config:ModelConfig.get_vocab_size": (),
    "vllm.lora.request:LoRARequest": ("lora_name", "lora_int_id", "lora_path"),
    "vllm.sampling_params:RequestOutputKind": ("DELTA",),
    "vllm.sampling_params:SamplingParams": (
        *("allowed_token_ids", "detokenize", "ignore_eos", "logprobs", "max_tokens", "output_kind", "temperature"),
        "structured_outputs",
    ),
    "vllm.sampling_params:StructuredOutputsParams": (*("choice", "grammar", "json", "regex", "structural_tag"),),
    "vllm.config:StructuredOutputsConfig": ("backend",),
    "vllm.tokenizers:cached_tokenizer_from_config": ("model_config", "/"),
    "vllm.v1.structured_output.backend_xgrammar:XgrammarBackend": ("compiler", "tokenizer", "vocab_size"),
    "vllm.v1.structured_output.utils:choice_as_grammar": ("choice", "/"),
    "vllm.v1.structured_output.utils:grammar_is_likely_lark": ("grammar_str", "/"),
    "vllm.outputs:RequestOutput": ("outputs", "prompt_token_ids"),
    "vllm.outputs:CompletionOutput": ("finish_reason", "index", "logprobs", "token_ids"),
    "vllm.outputs:PoolingRequestOutput": ("outputs", "prompt_token_ids"),
    "vllm.logprobs:Logprob": ("logprob",),
    "vllm.v1.metrics.loggers:PrometheusStatLogger": ("gauge_lora_info",),
    "vllm.v1.metrics.loggers:PrometheusStatLogger.__init__": ("vllm_config", "engine_indexes"),
    "vllm.v1.metrics.loggers:PrometheusStatLogger.record": ("scheduler_stats", "iteration_stats", "/"),
    "vllm.v1.metrics.loggers:uses self.gauge_lora_info": (),
    "vllm.v1.metrics.stats:IterationStats": ("finished_requests",),
    "vllm.v1.metrics.stats:FinishedRequestStats": (
        *("request_id", "num_prompt_tokens", "num_cached_tokens", "num_generation_tokens"),
        "mean_time_per_output_token",
    ),
}

API: Mapping[str, tuple[str, ...]] = {
    "vllm.entrypoints.openai.chat_completion.api_router:POST /v1/chat/completions": (),
    "vllm.entrypoints.openai.completion.api_router:POST /v1/completions": (),
    "vllm.entrypoints.openai.responses.api_router:POST /v1/responses": (),
    "vllm.entrypoints.anthropic.api_router:POST /v1/messages": (),
    "vllm.entrypoints.anthropic.api_router:POST /v1/messages/count_tokens": (),
    "vllm.entrypoints.pooling.embed.api_router:POST /v1/embeddings": (),
    "vllm.entrypoints.serve.tokenize.api_router:POST /tokenize": (),
    "vllm.entrypoints.serve.tokenize.api_router:POST /detokenize": (),
    "vllm.entrypoints.anthropic:api_router": ("create_error_response",),
    "vllm.entrypoints.anthropic.api_router:uses create_error_response": (),
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels": ("lora_requests",),
    "vllm.entrypoints.launchers.api_server.app_state:uses state.openai_serving_models": (),
    "vllm.entrypoints.serve.engine.serving:uses self.models.lora_requests": (),
    "vllm.entrypoints.serve.exception_handling.handlers.vllm_error:uses req.app.state.server": (),
    "vllm.entrypoints.openai.responses.serving:uses self.tool_server": (),
    "vllm.entrypoints.openai.responses.api_router:uses request.app.state.openai_serving_responses": (),
    "vllm.v1.engine.exceptions:EngineGenerateError": (),
    "vllm.exceptions:VLLMUnprocessableEntityError.__str__": (),
    "vllm.exceptions:VLLMValidationError.__str__": (),
    "vllm.exceptions:VLLMValidationError": ("parameter",),
    "vllm.exceptions:VLLMValidationError.__init__": ("message", "/", "parameter"),
    "vllm.exceptions:RetryableRequestError": (),
    "vllm.exceptions:RetryableRequestError.__init__": ("message",),
    "vllm.entrypoints.serve.exception_handling.error_response:create_error_response": ("message", "/"),
    "vllm.entrypoints.serve.engine.protocol:ErrorInfo": ("code", "message", "param"),
    "vllm.entrypoints.openai.chat_completion.protocol": (),
    **dict.fromkeys(BODY_MODULES, ()),
}

WORKER: Mapping[str, tuple[str, ...]] = {
    "vllm.config:ParallelConfig": ("worker_extension_cls",),
    "vllm.v1.worker.worker_base:WorkerBase": ("model_runner",),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": ("kv_caches",),  # also the CPU's
    "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin": ("lora_manager",),
    "vllm.lora.worker_manager:WorkerLoRAManager": ("_adapter_manager",),
    "vllm.lora.model_manager:LoRAModelManager": ("punica_wrapper_mapping",),
    "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU": ("sampler_indices", "token_lora_indices"),
    "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU.update_metadata": (
        *("mapping", "lora_index_to_id", "max_loras", "vocab_size"),
    ),
    "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU.add_lora_linear": (
        *("y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices", "/", "**"),
    ),
    "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU.add_lora_embedding": ("y", "x", "lora_b_stacked", "/"),
    "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU.add_lora_logits": (
        *("y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "/", "**"),
    ),
    "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU._apply_shrink": ("y", "x", "w_t_all", "scale", "/"),
    "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU._apply_expand": (
        *("y", "x", "w_t_all", "y_offset", "y_slice_size", "add_inputs", "/"),
    ),
}

CONTRACT: Mapping[str, tuple[str, ...]] = {**ENVIRONMENT, **ARGUMENTS, **START, **ENGINE, **API, **WORKER}
