"""Every error that a user's input can cause in the conversion stage.

ConvertError
├── CheckpointUnreadable     checkpoint_unreadable   no adapter there, half an adapter, not safetensors
├── CheckpointUnsupported    checkpoint_unsupported  readable, but no route can treat it honestly
├── TrainingUnknown          training_unknown        nothing says whether it is LoRA or QLoRA
├── BaseUnreadable           base_unreadable         no model there, or half a model
├── BaseMismatch             base_mismatch           the adapter was not trained on this base
├── RouteRefused             route_refused           the route would lose what was learnt; names those that don't
├── QualityGateFailed        quality_gate_failed     measured loss above the limit; nothing was published
├── TextUnreadable           text_unreadable         the held-out text is missing or in another form
├── OutputExists             output_exists           the destination is already there
├── OutputBusy               output_busy             another process is writing this destination
├── OutputUnwritable         output_unwritable       no room or no permission at the destination
└── ArtifactInvalid          artifact_invalid        not an artifact, or its bytes changed

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
