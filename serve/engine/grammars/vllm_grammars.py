"""The grammars of vLLM's requests, and the limits of what they cost."""

from __future__ import annotations

import json
from typing import Any

from vllm.config import VllmConfig
from vllm.exceptions import RetryableRequestError, VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend
from vllm.v1.structured_output.utils import choice_as_grammar, grammar_is_likely_lark

from serve.engine.api_errors import GRAMMAR_FIELD
from serve.engine.grammars.limits import GrammarChecks, GrammarLimits, GrammarRefused, GrammarsBusy
from serve.engine.grammars.trials import Grammar, GrammarTrials

_WITH_XGRAMMAR = ("auto", "xgrammar")


class GrammarTooCostly(VLLMValidationError):
    """`code` is that of the answer."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message, parameter=GRAMMAR_FIELD)
        self.code = code


class EngineGrammars:
    """Checks the grammars of one engine's requests."""

    def __init__(self, config: VllmConfig, limits: GrammarLimits) -> None:
        self._trials = GrammarTrials(lambda: _vocabulary(config)) if _uses_xgrammar(config) else None
        self._checks = GrammarChecks(limits, self._trials)

    async def start(self) -> None:
        if self._trials is not None:
            await self._trials.start()

    async def check(self, parameters: Any) -> None:
        """`parameters`: those of a request. Raises GrammarTooCostly, or RetryableRequestError while too many grammars
        are tried."""
        constraint = getattr(parameters, "structured_outputs", None)
        if constraint is None or (grammar := grammar_of(constraint)) is None:
            return
        try:
            await self._checks.check(grammar)
        except GrammarRefused as refused:
            raise GrammarTooCostly(str(refused), refused.code) from None
        except GrammarsBusy as busy:
            raise RetryableRequestError(str(busy)) from None

    def close(self) -> None:
        if self._trials is not None:
            self._trials.close()


def grammar_of(constraint: StructuredOutputsParams) -> Grammar | None:
    """None for a grammar that is always the same, and for one that vLLM refuses."""
    if constraint.json is not None:
        text = constraint.json if isinstance(constraint.json, str) else json.dumps(constraint.json)
        return Grammar("json", text)
    if constraint.regex is not None:
        return Grammar("regex", constraint.regex)
    if constraint.choice:
        return Grammar("ebnf", choice_as_grammar(constraint.choice))
    if constraint.grammar is not None:
        return Grammar("lark" if grammar_is_likely_lark(constraint.grammar) else "ebnf", constraint.grammar)
    if constraint.structural_tag is not None:
        return Grammar("structural_tag", constraint.structural_tag)
    return None


def _uses_xgrammar(config: VllmConfig) -> bool:
    if config.model_config.skip_tokenizer_init:
        return False
    return config.structured_outputs_config.backend in _WITH_XGRAMMAR


def _vocabulary(config: VllmConfig) -> str:
    """As the engine itself describes its tokens to xgrammar."""
    model = config.model_config
    tokenizer = cached_tokenizer_from_config(model_config=model)
    backend = XgrammarBackend(config, tokenizer=tokenizer, vocab_size=model.get_vocab_size())
    vocabulary: str = backend.compiler.compile_grammar('root ::= "a"').tokenizer_info.serialize_json()
    return vocabulary
