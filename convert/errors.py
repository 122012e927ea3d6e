"""Every error that a user's input can cause in the conversion stage.

ConvertError
├── CheckpointUnreadable     checkpoint_unreadable   no adapter there, half an adapter, not safetensors
├── CheckpointUnsupported    checkpoint_unsupported  readable, but no route can treat it honestly
├── TrainingUnknown          training_unknown        nothing says whether it is LoRA or QLoRA
├── BaseUnreadable           base_unreadable         no model there, or half a model
├── BaseMismatch             base_mismatch           the adapter was not trained on this base
├── RouteRefused             route_refused           the route would lose what was learnt; names those that don't
├── FormatRefused            format_refused          the storage format can't hold these weights; names those that can
├── TargetUnknown            target_unknown          no such target, or a GPU that vLLM does not run on
├── QuantizerMissing         quantizer_missing       the packages of the calibrated quantizers are not installed
├── QuantizerFailed          quantizer_failed        the calibrated quantizer stopped; its own words are in the message
├── QualityGateFailed        quality_gate_failed     a limit on what may be lost is not kept; nothing was published
├── TextUnreadable           text_unreadable         held-out text or canaries are missing or in another form
├── OutputExists             output_exists           the destination is already there
├── OutputBusy               output_busy             another process is writing this destination
├── OutputUnwritable         output_unwritable       no room or no permission at the destination
├── ArtifactInvalid          artifact_invalid        not an artifact, or its bytes changed
├── SigningKeyInvalid        signing_key_invalid     not an Ed25519 key in PEM
├── VerificationFailed       verification_failed     the engine doesn't say what the artifact's golden answers say
└── VerificationImpossible   verification_impossible no engine here, or nothing to compare it with

`code` is stable: scripts may match on it. A message says what was wrong, what was expected and what to do.
"""

from __future__ import annotations


class ConvertError(Exception):
    """A mistake in the input, told in words a user can act on."""

    code = "convert_error"


class CheckpointUnreadable(ConvertError):
    code = "checkpoint_unreadable"


class CheckpointUnsupported(ConvertError):
    code = "checkpoint_unsupported"


class TrainingUnknown(ConvertError):
    code = "training_unknown"


class BaseUnreadable(ConvertError):
    code = "base_unreadable"


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


class ArtifactInvalid(ConvertError):
    code = "artifact_invalid"


class SigningKeyInvalid(ConvertError):
    code = "signing_key_invalid"


class VerificationFailed(ConvertError):
    code = "verification_failed"


class VerificationImpossible(ConvertError):
    code = "verification_impossible"
