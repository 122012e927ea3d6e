"""The model that a conversion has written, read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel
from convert.quality.models.peft_reference import changed_weights
from convert.quality.models.streamed_model import StreamedModel


def open_written(model: Path, adapter: Path | None) -> StreamedModel:
    """The written model with the written adapter, if there is one, as PEFT loads it."""
    base = BaseModel.open(model)
    if adapter is None:
        return StreamedModel(base)

    def adapt(plain: Any) -> Any:
        from peft import PeftModel

        return PeftModel.from_pretrained(plain, str(adapter)).eval()

    return StreamedModel(base, adapt=adapt, held=changed_weights(Checkpoint.open(adapter)))
