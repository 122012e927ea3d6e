"""Was the adapter trained on full-precision weights (LoRA) or on 4-bit weights (QLoRA)?

It decides everything that follows and the adapter's own files don't say it: only what trainers leave beside them
does (`notes` says where). A plain base name proves nothing, since QLoRA usually quantizes while loading; so without
evidence, or with evidence that contradicts itself, the answer is UNKNOWN. training_args.bin is a pickle and is never
opened.

    graft_training.json    {"schema": "graft.training/1", "trained_on": "4bit" | "full",
                            "quantizer": {"kind": "nf4", "double": true} | null}

beside the adapter says it outright: `recover` writes it, and so may anyone who knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from convert import notes
from convert.base_model import public_name
from convert.checkpoint import Checkpoint
from convert.errors import CheckpointUnsupported, TrainingUnknown
from convert.evidence import BASE_LOOKS, NOTE_LOOKS, Evidence, Quantizer, Training, from_stamp

__all__ = ["Detection", "Evidence", "Quantizer", "Training", "detect", "told"]


@dataclass(frozen=True)
class Detection:
    """The answer and what it rests on."""

    training: Training
    lines: tuple[str, ...]
    quantizer: Quantizer | None

    def require_known(self, checkpoint: Path) -> Detection:
        """Raises TrainingUnknown, and CheckpointUnsupported for a quantizer other than NF4."""
        if self.training is Training.UNKNOWN:
            found = "".join(f"\n  - {line}" for line in self.lines)
            raise TrainingUnknown(
                f"Nothing certain says whether {checkpoint} is LoRA or QLoRA:{found}\n"
                "The two need different base weights. Say what the base was while training: --trained-on 4bit, "
                "if it was loaded with load_in_4bit (QLoRA), or --trained-on full (LoRA)."
            )
        if self.quantizer and self.quantizer.kind != "nf4":
            raise CheckpointUnsupported(
                f"{checkpoint} was trained on a base quantized to {self.quantizer.kind} ({'; '.join(self.lines)}). "
                f"{_OTHER_QUANTIZERS.get(self.quantizer.kind, '')}"
                "Only 4-bit NF4 of bitsandbytes can be reproduced so far: train on NF4 "
                "(bnb_4bit_quant_type='nf4') or on the full-precision model."
            )
        return self


# Why a quantizer that could be taken for bitsandbytes' NF4 is none.
_OTHER_QUANTIZERS: Mapping[str, str] = {
    "nf4-torchao": "torchao's NF4 rounds its scales otherwise than bitsandbytes', so the weights differ. ",
}


def detect(checkpoint: Checkpoint) -> Detection:
    """Weigh everything the trainer left. Reads small text files only.

    Raises CheckpointUnreadable for a broken stamp.
    """
    stamp = from_stamp(checkpoint)
    evidence = ([stamp] if stamp else []) + _from_notes(checkpoint)
    if not stamp:  # the base's name can outlive what it says: a recovered adapter still names the 4-bit base
        evidence += [found for look in BASE_LOOKS if (found := look(checkpoint))]
    lines = tuple(one.line for one in evidence)
    answers = {one.says for one in evidence}
    if len(answers) != 1:
        return Detection(Training.UNKNOWN, lines or (_nothing(checkpoint),), None)
    quantizers = [one.quantizer for one in evidence if one.quantizer]
    kinds = {quantizer.kind for quantizer in quantizers}
    doubles = {quantizer.double for quantizer in quantizers} - {None}
    if len(kinds) > 1 or len(doubles) > 1:
        return Detection(Training.UNKNOWN, lines, None)
    partial = any(quantizer.partial for quantizer in quantizers)
    quantizer = Quantizer(kinds.pop(), next(iter(doubles), None), partial) if kinds else None
    return Detection(answers.pop(), lines, quantizer)


def told(training: Training, found: Detection) -> Detection:
    """The user's word instead of the evidence; settings of the quantizer that were found stay."""
    word = "4-bit" if training is Training.QLORA else "full-precision"
    quantizer = (found.quantizer or Quantizer()) if training is Training.QLORA else None
    return Detection(training, (f"the user says it was trained on {word} weights",), quantizer)


def _nothing(checkpoint: Checkpoint) -> str:
    name = public_name(checkpoint.base_name) if checkpoint.base_name else "none"
    return f"no notes of a trainer; the base's name ({name}) proves nothing: it may have been quantized while loading"


def _from_notes(checkpoint: Checkpoint) -> list[Evidence]:
    """What each kind of note says; of two of a kind the nearer one speaks."""
    places = notes.directories(checkpoint.root)
    found = []
    for look in NOTE_LOOKS:
        for place in places:
            if evidence := look(place):
                above = "" if place == checkpoint.root else " (of the run)"
                found.append(replace(evidence, line=evidence.line + above))
                break
    return found
