"""Verifies an artifact: hashes its files, serves it with a real vLLM, and compares the answers with golden.json."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from convert.artifact import GOLDEN, Artifact, Golden, file_sha256, problems_of
from convert.errors import ArtifactInvalid, BaseMismatch, VerificationFailed, VerificationImpossible
from convert.progress import Progress, silent
from convert.verification.checks import LIMITS, Check, Subject, examine
from convert.verification.engine import DEFAULT_ENGINE, EngineOptions, ServedModel, running_engine
from convert.verification.speed import DecodeSpeed, decode_speed

_BASE = "base"
_CONFIGS = ("generation_config.json", "config.json")
# vLLM rounds the KV cache up to whole blocks anyway.
_CONTEXT_STEP = 256


@dataclass(frozen=True)
class VerifyOptions:
    """The engine that serves the artifact, and the length of its answers."""

    engine: EngineOptions = DEFAULT_ENGINE
    answer_tokens: int = 64
    """The longest answer to a golden chat or a canary."""
    speed_streams: tuple[int, ...] = ()
    """The numbers of concurrent streams with which decode speed is measured; empty: it isn't measured."""
    speed_tokens: int = 64


DEFAULT_OPTIONS = VerifyOptions()


@dataclass(frozen=True)
class VerificationReport:
    """Every check with its result."""

    artifact: Path
    name: str
    vllm: str
    checks: tuple[Check, ...]
    speed: tuple[DecodeSpeed, ...] = ()

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.passed is False)

    @property
    def passed(self) -> bool:
        return not self.failures

    def require_passed(self) -> None:
        """Raises VerificationFailed with every check that failed."""
        if self.passed:
            return
        failed = "; ".join(_sentence(check) for check in self.failures)
        raise VerificationFailed(
            f"{self.artifact}: vLLM {self.vllm} doesn't answer as its golden answers say. {failed}. "
            "Don't serve it: convert it again, or serve it with the version of vLLM that it was verified with."
        )

    def document(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return {
            "artifact": str(self.artifact),
            "name": self.name,
            "vllm": self.vllm,
            "passed": self.passed,
            "checks": [asdict(check) for check in self.checks],
            "decode_speed": [asdict(speed) for speed in self.speed],
        }


def verify(
    artifact: Artifact,
    base: Artifact | None = None,
    options: VerifyOptions = DEFAULT_OPTIONS,
    progress: Progress = silent,
) -> VerificationReport:
    """Hash every file, serve the artifact with vLLM, and check it. `base`: the artifact that holds the adapter's base.

    Raises ArtifactInvalid where bytes differ, before anything is loaded; BaseMismatch for another base;
    VerificationImpossible where there are no golden answers or no engine; VerificationFailed where vLLM can't load the
    artifact or fails during a request. Checks that failed are in the report: `require_passed` raises an error for them.
    """
    model = _model_path(artifact, base)
    artifact.verify()
    if base and artifact.model_path is None:
        base.verify()
    golden = golden_of(artifact)
    served = _served_model(artifact, model, _context_tokens(golden, options))
    with running_engine(served, options.engine, progress) as client:
        name = artifact.manifest.name
        subject = Subject(
            client=client,
            model=name,
            base=served.name if served.adapters else None,
            golden=golden,
            limits=LIMITS[artifact.manifest.model.quantization],
            stop_token_ids=stop_token_ids(model),
            answer_tokens=options.answer_tokens,
        )
        checks = examine(subject, progress)
        speed = decode_speed(client, name, options.speed_streams, options.speed_tokens, progress)
        return VerificationReport(artifact.root, name, client.version(), checks, speed)


def _served_model(artifact: Artifact, model: Path, context_tokens: int) -> ServedModel:
    """The model under the artifact's name, or a base with the artifact's adapter, which has the artifact's name."""
    name, adapter = artifact.manifest.name, artifact.manifest.adapter
    if adapter is None or artifact.adapter_path is None:
        return ServedModel(model, name, context_tokens)
    return ServedModel(model, _BASE, context_tokens, {name: artifact.adapter_path}, adapter.rank)


def golden_of(artifact: Artifact) -> Golden:
    """The golden answers of an artifact.

    Raises VerificationImpossible where there are none, and ArtifactInvalid where they are not those of the manifest or
    contradict themselves.
    """
    expected, path = artifact.manifest.golden, artifact.root / GOLDEN
    if expected is None:
        raise VerificationImpossible(
            f"NOT VERIFIED: {artifact.root} has no golden answers to compare with. Convert the checkpoint again, "
            "with the full-precision base and without --no-measure."
        )
    if not path.is_file() or file_sha256(path) != expected:
        difference = "has other bytes" if path.is_file() else "is missing"
        raise ArtifactInvalid(f"{artifact.root} does not match its manifest: {GOLDEN} {difference}. Copy it again.")
    try:
        golden = Golden.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ArtifactInvalid(f"{path} does not have the format of golden answers: {problems_of(error)}") from error
    if problems := [*_golden_problems(golden)]:
        raise ArtifactInvalid(f"{path} contradicts itself: {'; '.join(problems)}")
    return golden


def stop_token_ids(model: Path) -> frozenset[int]:
    """The stop tokens of a model: eos_token_id of generation_config.json, or else of config.json."""
    for name in _CONFIGS:
        try:
            ids = json.loads((model / name).read_text(encoding="utf-8"))["eos_token_id"]
            return frozenset(map(int, ids if isinstance(ids, list) else [ids]))
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue
    return frozenset()


def _model_path(artifact: Artifact, base: Artifact | None) -> Path:
    if artifact.model_path:
        return artifact.model_path
    fingerprint = artifact.manifest.model.fingerprint
    if base is None:
        raise VerificationImpossible(
            f"NOT VERIFIED: {artifact.root} holds only the adapter; its base {fingerprint[:12]} lies in another "
            "artifact. Name that one with --base."
        )
    if base.manifest.model.fingerprint != fingerprint or base.model_path is None:
        raise BaseMismatch(
            f"{base.root} doesn't hold the base of {artifact.root}, which is {fingerprint[:12]}: "
            + (f"it holds {base.manifest.model.fingerprint[:12]}." if base.model_path else "it holds no model.")
        )
    return base.model_path


def _golden_problems(golden: Golden) -> Iterable[str]:
    if not golden.prompts:
        yield "there are no prompts"
    for number, prompt in enumerate(golden.prompts):
        expected = len(prompt.token_ids) - 1
        for name in ("reference", "result", "base"):
            log_probs = getattr(prompt, name)
            if log_probs is not None and len(log_probs) != expected:
                yield f"prompts.{number}.{name} has {len(log_probs)} log-probabilities for {expected} tokens"


def _context_tokens(golden: Golden, options: VerifyOptions) -> int:
    """A context that holds every prompt and chat with its answer. A token has at least one byte."""
    longest = max(len(prompt.token_ids) for prompt in golden.prompts)
    chats = [len(chat.rendered.encode()) for chat in golden.chats]
    canaries = [sum(len(str(message).encode()) for message in canary.messages) for canary in golden.canaries]
    needed = max([longest, *chats, *canaries]) + max(options.answer_tokens, options.speed_tokens) + _CONTEXT_STEP
    return -(-needed // _CONTEXT_STEP) * _CONTEXT_STEP


def _sentence(check: Check) -> str:
    details = f" ({'; '.join(check.details)})" if check.details else ""
    return f"{check.name}: {check.found}, expected {check.expected}{details}"
