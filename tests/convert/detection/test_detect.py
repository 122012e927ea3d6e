from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from convert.detection.detect import Detection, detect, stated_by_user
from convert.detection.training import Training
from convert.errors import CheckpointUnsupported, TrainingUnknown
from convert.inputs.adapter_checkpoint import Checkpoint
from tests.convert import parts

PEFT_CARD = """
## Training procedure

The following `bitsandbytes` quantization config was used during training:
- quant_method: bitsandbytes
- load_in_8bit: {eight}
- load_in_4bit: {four}
- bnb_4bit_quant_type: {kind}
- bnb_4bit_use_double_quant: True
- bnb_4bit_compute_dtype: bfloat16

### Framework versions
"""
AXOLOTL_CARD = """
[Built with Axolotl](https://github.com/axolotl-ai-cloud/axolotl)

```yaml
adapter: {adapter}
base_model: acme/tiny-llama
load_in_4bit: {four}  # comment
load_in_8bit: {eight}
datasets:
  - path: x
```
"""


@pytest.fixture
def checkpoint(unmarked: Path, tmp_path: Path) -> Path:
    return parts.copy(unmarked, tmp_path / "checkpoint")


def detection_of(checkpoint: Path) -> Detection:
    return detect(Checkpoint.open(checkpoint))


def swift(**arguments: Any) -> tuple[str, str]:
    return "args.json", json.dumps(arguments)


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        (*swift(quant_method="bnb", quant_bits=4), Training.QLORA),
        (*swift(quant_method=None, quant_bits=None), Training.LORA),
        (*swift(quant_method=None, quant_bits=0), Training.LORA),
        (*swift(model="x"), Training.UNKNOWN),
        ("args.json", "{", Training.UNKNOWN),
        ("README.md", PEFT_CARD.format(four=True, eight=False, kind="nf4"), Training.QLORA),
        ("README.md", PEFT_CARD.format(four=False, eight=False, kind="nf4"), Training.LORA),
        ("README.md", AXOLOTL_CARD.format(adapter="qlora", four="true", eight="false"), Training.QLORA),
        ("README.md", AXOLOTL_CARD.format(adapter="lora", four="false", eight="false"), Training.LORA),
        ("README.md", "load_in_4bit: true", Training.UNKNOWN),
        ("training_args.yaml", "top.booster: auto\nquantization_bit: 4\nquantization_type: nf4\n", Training.QLORA),
        ("training_args.yaml", "quantization_bit: null\n", Training.LORA),
        ("training_args.yaml", "stage: sft\n", Training.UNKNOWN),
    ],
)
def test_the_files_of_trainers_are_understood(checkpoint: Path, file: str, content: str, expected: Training) -> None:
    (checkpoint / file).write_text(content)

    assert detection_of(checkpoint).training is expected


def test_a_plain_base_name_proves_nothing(checkpoint: Path) -> None:
    detection = detection_of(checkpoint)

    assert detection.training is Training.UNKNOWN
    assert "may have been quantized while loading" in detection.sources[0]
    with pytest.raises(TrainingUnknown, match="--trained-on 4bit"):
        detection.require_known(checkpoint)


def test_a_base_name_that_says_4_bit_is_a_source(checkpoint: Path) -> None:
    parts.edit_json(checkpoint / "adapter_config.json", base_model_name_or_path="unsloth/tiny-llama-bnb-4bit")

    assert detection_of(checkpoint).training is Training.QLORA
    assert Checkpoint.open(checkpoint).layout == "unsloth"


def test_a_local_base_tells_how_it_is_stored_without_leaking_where(checkpoint: Path, nf4_base: Path) -> None:
    renamed = parts.copy(nf4_base, checkpoint.parent / "plain-name")
    parts.edit_json(checkpoint / "adapter_config.json", base_model_name_or_path=str(renamed))

    detection = detection_of(checkpoint)

    assert detection.training is Training.QLORA
    assert detection.quantizer
    assert detection.quantizer.double is True
    assert str(renamed.parent) not in " ".join(detection.sources)


def test_sources_that_contradict_each_other_are_unknown_and_both_are_shown(checkpoint: Path) -> None:
    parts.mark_lora(checkpoint)
    (checkpoint / "README.md").write_text(PEFT_CARD.format(four=True, eight=False, kind="nf4"))

    detection = detection_of(checkpoint)

    assert detection.training is Training.UNKNOWN
    assert len(detection.sources) == 2


@pytest.mark.parametrize(
    ("file", "content", "kind"),
    [
        (*swift(quant_method="bnb", quant_bits=4, bnb_4bit_quant_type="fp4"), "fp4"),
        (*swift(quant_method="bnb", quant_bits=8), "8-bit"),
        (*swift(quant_method="hqq", quant_bits=4), "hqq"),
        ("README.md", PEFT_CARD.format(four=True, eight=False, kind="fp4"), "fp4"),
        ("README.md", AXOLOTL_CARD.format(adapter="lora", four="false", eight="true"), "8-bit"),
        ("training_args.yaml", "quantization_bit: 8\n", "8-bit"),
    ],
)
def test_another_quantizer_is_named_and_refused(checkpoint: Path, file: str, content: str, kind: str) -> None:
    (checkpoint / file).write_text(content)

    with pytest.raises(CheckpointUnsupported, match=kind):
        detection_of(checkpoint).require_known(checkpoint)


def test_the_users_word_replaces_missing_sources(checkpoint: Path) -> None:
    detection = stated_by_user(Training.QLORA, detection_of(checkpoint)).require_known(checkpoint)

    assert detection.training is Training.QLORA
    assert "user" in detection.sources[0]


def test_training_args_bin_is_never_opened(checkpoint: Path) -> None:
    (checkpoint / "training_args.bin").symlink_to("/nonexistent/would-fail-if-opened")

    assert detection_of(checkpoint).training is Training.UNKNOWN
