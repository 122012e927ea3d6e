"""Every error of `convert` that a user's input can cause.

ConvertError
├── CheckpointUnreadable     checkpoint_unreadable   no adapter there, an incomplete one, or not safetensors
├── CheckpointUnsupported    checkpoint_unsupported  readable, but no route can convert it correctly
├── TrainingUnknown          training_unknown        nothing says whether it is LoRA or QLoRA
├── BaseUnreadable           base_unreadable         no model there, or an incomplete or damaged one
├── ArchitectureUnknown      architecture_unknown    the model is of a family that is not converted
├── BaseMismatch             base_mismatch           the adapter was not trained on this base
├── RouteRefused             route_refused           the route would lose what was learnt; names other routes
├── FormatRefused            format_refused          the format can't store these weights; names other formats
├── TargetUnknown            target_unknown          no such target, or a GPU that vLLM does not run on
├── QuantizerMissing         quantizer_missing       the packages of the calibrated quantizers are not installed
├── QuantizerFailed          quantizer_failed        the calibrated quantizer failed; the message has its error
├── QualityGateFailed        quality_gate_failed     the loss exceeds a limit; nothing was published
├── TextUnreadable           text_unreadable         held-out text or canaries are missing or malformed
├── OutputExists             output_exists           the destination is already there
├── OutputBusy               output_busy             another process is writing this destination
├── OutputUnwritable         output_unwritable       no space or no permission at the destination
├── MemoryShort              memory_short            a phase needs more memory than is free
├── FileInaccessible         file_inaccessible       the system refuses to read or write a file
├── ArtifactInvalid          artifact_invalid        not an artifact, or its bytes changed
├── SigningKeyInvalid        signing_key_invalid     not an Ed25519 key in PEM
├── VerificationFailed       verification_failed     the engine doesn't give the artifact's golden answers
└── VerificationImpossible   verification_impossible no engine here, or no golden answers to compare with

Every class has a `code` that stays the same: scripts may compare it. A message says what was wrong, what was expected
and what to do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# A word that may be the name of a weight or a module, in which only the layer differs between problems of one cause.
# Two simple patterns: a problem may quote a long text of somebody else, on which one for both would take hours.
_WORD = re.compile(r"[\w.-]+")
_IN_LAYER = re.compile(r"\blayers\.\d+\.[\w.-]")


class ConvertError(Exception):
    """A mistake in the input, with a message that says what to do."""

    code = "convert_error"


class CheckpointUnreadable(ConvertError):
    code = "checkpoint_unreadable"


class CheckpointUnsupported(ConvertError):
    code = "checkpoint_unsupported"


class TrainingUnknown(ConvertError):
    code = "training_unknown"


class BaseUnreadable(ConvertError):
    code = "base_unreadable"


class ArchitectureUnknown(ConvertError):
    code = "architecture_unknown"


class BaseMismatch(ConvertError):
    code = "base_mismatch"


class RouteRefused(ConvertError):
    code = "route_refused"


class FormatRefused(ConvertError):
    code = "format_refused"


class TargetUnknown(ConvertError):
    code = "target_unknown"


class QuantizerMissing(ConvertError):
    code = "quantizer_missing"


class QuantizerFailed(ConvertError):
    code = "quantizer_failed"


class QualityGateFailed(ConvertError):
    code = "quality_gate_failed"


class TextUnreadable(ConvertError):
    code = "text_unreadable"


class OutputExists(ConvertError):
    code = "output_exists"


class OutputBusy(ConvertError):
    code = "output_busy"


class OutputUnwritable(ConvertError):
    code = "output_unwritable"


class MemoryShort(ConvertError):
    code = "memory_short"


class FileInaccessible(ConvertError):
    code = "file_inaccessible"


class ArtifactInvalid(ConvertError):
    code = "artifact_invalid"


class SigningKeyInvalid(ConvertError):
    code = "signing_key_invalid"


class VerificationFailed(ConvertError):
    code = "verification_failed"


class VerificationImpossible(ConvertError):
    code = "verification_impossible"


def one_for_each_cause(problems: Iterable[str]) -> tuple[str, ...]:
    """The first problem of every cause, with the number of further ones that differ only in the module they name."""
    causes: dict[str, list[str]] = {}
    for problem in problems:
        cause = _WORD.sub(lambda word: "" if _IN_LAYER.search(word[0]) else word[0], problem)
        causes.setdefault(cause, []).append(problem)
    return tuple(
        first if not more else f"{first} (the same in {len(more)} more places)" for first, *more in causes.values()
    )
