"""graft_training.json: a file beside an adapter that states how the adapter was trained.

    {"schema": "graft.training/1", "trained_on": "4bit" | "full",
     "quantizer": {"kind": "nf4", "double": true} | null}

The route `recover` writes this file, and users may write it too.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from convert.artifact.json_files import read_json
from convert.detection.training import Training, TrainingQuantizer, TrainingSource
from convert.errors import CheckpointUnreadable
from convert.inputs.adapter_checkpoint import Checkpoint

STAMP = "graft_training.json"

_SCHEMA = "graft.training/1"


class _StampQuantizer(BaseModel):
    model_config = ConfigDict(strict=True)

    kind: str = "nf4"
    double: bool | None = None


class _Stamp(BaseModel):
    model_config = ConfigDict(strict=True)

    schema_: Literal["graft.training/1"] = Field(alias="schema")
    trained_on: Literal["4bit", "full"]
    quantizer: _StampQuantizer | None = None


def stamp_document(training: Training, quantizer: TrainingQuantizer | None = None) -> dict[str, Any]:
    """The content of graft_training.json for an adapter of a known training."""
    settings = {"kind": quantizer.kind, "double": quantizer.double} if quantizer else None
    trained_on = "4bit" if training is Training.QLORA else "full"
    return {"schema": _SCHEMA, "trained_on": trained_on, "quantizer": settings}


def read_stamp(checkpoint: Checkpoint) -> TrainingSource | None:
    """What graft_training.json says; None where the file is missing. Raises CheckpointUnreadable for other content."""
    path = checkpoint.root / STAMP
    if not path.is_file():
        return None
    stamp = _parse(read_json(path, CheckpointUnreadable))
    if stamp is None:
        raise CheckpointUnreadable(
            f'{path} is malformed: expected {{"schema": "{_SCHEMA}", "trained_on": "4bit" or "full", '
            '"quantizer": {"kind": "nf4", "double": true} or null}. Correct it, or remove it.'
        )
    sentence = f"{STAMP}: trained_on={stamp.trained_on}"
    if stamp.trained_on == "full":
        return TrainingSource(Training.LORA, sentence)
    settings = stamp.quantizer or _StampQuantizer()
    quantizer = TrainingQuantizer(settings.kind, settings.double)
    return TrainingSource(Training.QLORA, f"{sentence}, {quantizer.kind}", quantizer)


def _parse(content: Any) -> _Stamp | None:
    try:
        stamp = _Stamp.model_validate(content)
    except ValidationError:
        return None
    return None if stamp.trained_on == "full" and stamp.quantizer else stamp
