"""Decides whether an adapter was trained on full-precision weights (LoRA) or on 4-bit weights (QLoRA).

The answer decides every later step, and the adapter's own files don't hold it: only the files that trainers leave
beside them do (`training_sources` reads them). The name of a plain base proves nothing, because QLoRA usually
quantizes while it loads. Without a source, or with sources that contradict each other, the answer is UNKNOWN.
training_args.bin is a pickle and is never opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from convert.detection.stamp import read_stamp
from convert.detection.training import Training, TrainingQuantizer, TrainingSource
from convert.detection.training_sources import BASE_SOURCES, TRAINER_FILE_SOURCES
from convert.errors import CheckpointUnsupported, TrainingUnknown
from convert.inputs import trainer_files
from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.trainer_files import public_name


@dataclass(frozen=True)
class Detection:
    """Whether an adapter is LoRA or QLoRA. `sources`: a sentence for each source of the answer.

    `confidence`: the figure that a measured answer rests on; None where a file or the user says it.
    """

    training: Training
    sources: tuple[str, ...]
    quantizer: TrainingQuantizer | None
    confidence: str | None = None

    def require_known(self, checkpoint: Path) -> Detection:
        """This detection. Raises TrainingUnknown, and CheckpointUnsupported for a quantizer other than NF4."""
        if self.training is Training.UNKNOWN:
            listed = "".join(f"\n  - {source}" for source in self.sources)
            raise TrainingUnknown(
                f"No reliable source says whether {checkpoint} is LoRA or QLoRA:{listed}\n"
                "The two need different base weights. Say what the base was while training: --trained-on 4bit, "
                "if it was loaded with load_in_4bit (QLoRA), or --trained-on full (LoRA)."
            )
        if self.quantizer and self.quantizer.kind != "nf4":
            raise CheckpointUnsupported(
                f"{checkpoint} was trained on a base quantized to {self.quantizer.kind} ({'; '.join(self.sources)}). "
                f"{_OTHER_QUANTIZERS.get(self.quantizer.kind, '')}"
                "Only 4-bit NF4 of bitsandbytes can be reproduced so far: train on NF4 "
                "(bnb_4bit_quant_type='nf4') or on the full-precision model."
            )
        return self


# Quantizers that could be mistaken for bitsandbytes' NF4, with the difference.
_OTHER_QUANTIZERS: Mapping[str, str] = {
    "nf4-torchao": "torchao's NF4 rounds its scales otherwise than bitsandbytes', so the weights differ. ",
}


def detect(checkpoint: Checkpoint) -> Detection:
    """Combine the answers of all sources. Reads small text files only.

    Raises CheckpointUnreadable for a broken graft_training.json.
    """
    stamp = read_stamp(checkpoint)
    sources = ([stamp] if stamp else []) + _from_trainer_files(checkpoint)
    if not stamp:  # a recovered adapter is a LoRA, and may still name the 4-bit base that it came from
        sources += [source for read in BASE_SOURCES if (source := read(checkpoint))]
    sentences = tuple(source.sentence for source in sources)
    answers = {source.training for source in sources}
    if len(answers) != 1:
        return Detection(Training.UNKNOWN, sentences or (_no_source(checkpoint),), None)
    quantizers = [source.quantizer for source in sources if source.quantizer]
    kinds = {quantizer.kind for quantizer in quantizers}
    doubles = {quantizer.double for quantizer in quantizers} - {None}
    if len(kinds) > 1 or len(doubles) > 1:  # the sources contradict each other
        return Detection(Training.UNKNOWN, sentences, None)
    partial = any(quantizer.partial for quantizer in quantizers)
    quantizer = TrainingQuantizer(kinds.pop(), next(iter(doubles), None), partial) if kinds else None
    return Detection(answers.pop(), sentences, quantizer)


def stated_by_user(training: Training, detection: Detection) -> Detection:
    """The user's statement in place of the detected answer. Detected settings of the quantizer stay."""
    word = "4-bit" if training is Training.QLORA else "full-precision"
    quantizer = (detection.quantizer or TrainingQuantizer()) if training is Training.QLORA else None
    return Detection(training, (f"the user says it was trained on {word} weights",), quantizer)


def _no_source(checkpoint: Checkpoint) -> str:
    name = public_name(checkpoint.base_name) if checkpoint.base_name else "none"
    return (
        f"no trainer's file says it; the base's name ({name}) proves nothing: it may have been quantized while loading"
    )


def _from_trainer_files(checkpoint: Checkpoint) -> list[TrainingSource]:
    """One source for each kind of file, from the directory nearest to the checkpoint that has it."""
    sources = []
    for read in TRAINER_FILE_SOURCES:
        for directory in trainer_files.directories(checkpoint.root):
            if source := read(directory):
                suffix = "" if directory == checkpoint.root else " (of the run)"
                sources.append(replace(source, sentence=source.sentence + suffix))
                break
    return sources
