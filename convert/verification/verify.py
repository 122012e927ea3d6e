"""Verify an artifact: its bytes, and what real vLLM says when it serves them."""

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
from convert.verification.engine import HERE, EngineOptions, Served, running_engine
from convert.verification.speed import DecodeSpeed, decode_speed

_BASE = "base"
_CONFIGS = ("generation_config.json", "config.json")
# vLLM rounds the KV cache up to whole blocks anyway.
_CONTEXT_STEP = 256


@dataclass(frozen=True)
class VerifyOptions:
    """What is asked, and of which engine."""

    engine: EngineOptions = HERE
    answer_tokens: int = 64
    """Bound of an answer to a golden chat or a canary."""
    speed_streams: tuple[int, ...] = ()
    """Numbers of streams at once to measure decode speed with; empty: it isn't measured."""
    speed_tokens: int = 64


DEFAULTS = VerifyOptions()


@dataclass(frozen=True)
class VerificationReport:
    """Every check and what came out."""

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
        """Raises VerificationFailed naming every check that failed."""
        if self.passed:
            return
        told = "; ".join(_told(check) for check in self.failures)
        raise VerificationFailed(
            f"{self.artifact}: vLLM {self.vllm} doesn't answer as its golden answers say. {told}. "
            "Don't serve it: convert it again, or serve it with the version of vLLM that it was verified with."
        )

    def document(self) -> dict[str, Any]:
        """For programs."""
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
    options: VerifyOptions = DEFAULTS,
    progress: Progress = silent,
) -> VerificationReport:
    """Hash every file, serve the artifact in vLLM, and ask. `base`: the artifact that holds the adapter's base.

    Raises ArtifactInvalid where bytes differ (then nothing is loaded), VerificationImpossible where nothing can be
    said, BaseMismatch for another base, and VerificationFailed where vLLM can't load it or breaks down. A report of
    checks that failed is returned: `require_passed` makes an error of it.
    """
    model = _model_path(artifact, base)
    artifact.verify()
    if base and artifact.model_path is None:
        base.verify()
    golden = golden_of(artifact)
    name = artifact.manifest.name
    separate = artifact.manifest.adapter
    served = Served(
        model=model,
        name=_BASE if separate else name,
        context_tokens=_context_tokens(golden, options),
        adapters={name: artifact.adapter_path} if separate and artifact.adapter_path else {},
        rank=separate.rank if separate else 0,
    )
    with running_engine(served, options.engine, progress) as client:
        subject = Subject(
            client=client,
            model=name,
            base=_BASE if separate else None,
            golden=golden,
            limits=LIMITS[artifact.manifest.model.quantization],
            stop_token_ids=stop_token_ids(model),
            answer_tokens=options.answer_tokens,
        )
        checks = examine(subject, progress)
        speed = decode_speed(client, name, options.speed_streams, options.speed_tokens, progress)
        return VerificationReport(artifact.root, name, client.version(), checks, speed)


def golden_of(artifact: Artifact) -> Golden:
    """The golden answers. Raises ArtifactInvalid where they aren't those of the manifest or contradict themselves,
    VerificationImpossible where there are none."""
    expected, path = artifact.manifest.golden, artifact.root / GOLDEN
    if expected is None:
        raise VerificationImpossible(
            f"NOT VERIFIED: {artifact.root} has no golden answers to compare with. Convert the checkpoint again, "
            "with the full-precision base and without --no-measure."
        )
    if not path.is_file() or file_sha256(path) != expected:
        what = "has other bytes" if path.is_file() else "is missing"
        raise ArtifactInvalid(f"{artifact.root} is not what its manifest says: {GOLDEN} {what}. Copy it again.")
    try:
        golden = Golden.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ArtifactInvalid(f"{path} is not in the form of golden answers: {problems_of(error)}") from error
    if problems := [*_golden_problems(golden)]:
        raise ArtifactInvalid(f"{path} contradicts itself: {'; '.join(problems)}")
    return golden


def stop_token_ids(model: Path) -> frozenset[int]:
    """What the files say of stopping: generation_config.json, or config.json where that says nothing."""
    for name in _CONFIGS:
        try:
            ids = json.loads((model / name).read_text(encoding="utf-8"))["eos_token_id"]
            return frozenset(map(int, ids if isinstance(ids, list) else [ids]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return frozenset()


def _model_path(artifact: Artifact, base: Artifact | None) -> Path:
    if artifact.model_path:
        return artifact.model_path
    wanted = artifact.manifest.model.fingerprint
    if base is None:
        raise VerificationImpossible(
            f"NOT VERIFIED: {artifact.root} holds only the adapter; its base {wanted[:12]} lies in another artifact. "
            "Name that one with --base."
        )
    if base.manifest.model.fingerprint != wanted or base.model_path is None:
        raise BaseMismatch(
            f"{base.root} doesn't hold the base of {artifact.root}: that is {wanted[:12]}, "
            f"this is {base.manifest.model.fingerprint[:12]}{'' if base.model_path else ', and it lies elsewhere'}."
        )
    return base.model_path


def _golden_problems(golden: Golden) -> Iterable[str]:
    if not golden.prompts:
        yield "there are no prompts"
    for number, prompt in enumerate(golden.prompts):
        expected = len(prompt.token_ids) - 1
        for what in ("reference", "result", "base"):
            answers = getattr(prompt, what)
            if answers is not None and len(answers) != expected:
                yield f"prompts.{number}.{what} has {len(answers)} log-probabilities for {expected} tokens"


def _context_tokens(golden: Golden, options: VerifyOptions) -> int:
    """Enough for every prompt and chat with its answer. A token is at least a byte."""
    longest = max(len(prompt.token_ids) for prompt in golden.prompts)
    chats = [len(chat.rendered.encode()) for chat in golden.chats]
    asked = [sum(len(str(message).encode()) for message in canary.messages) for canary in golden.canaries]
    needed = max([longest, *chats, *asked]) + max(options.answer_tokens, options.speed_tokens) + _CONTEXT_STEP
    return -(-needed // _CONTEXT_STEP) * _CONTEXT_STEP


def _told(check: Check) -> str:
    details = f" ({'; '.join(check.details)})" if check.details else ""
    return f"{check.name}: {check.found}, expected {check.expected}{details}"
