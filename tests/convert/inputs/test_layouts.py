"""Whatever trainer left it: its layout, what it was trained on, and the same tensors meaning the same thing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.detection.detect import detect
from convert.detection.stamp import STAMP, stamp_document
from convert.detection.training import Training, TrainingQuantizer
from convert.errors import BaseMismatch, CheckpointUnreadable, CheckpointUnsupported
from convert.inputs.adapter_checkpoint import Checkpoint
from tests.convert import parts, trainers
from tests.convert.asking import Request, convert
from tests.convert.trainers import TRAINERS


def checkpoint_of(unmarked: Path, tmp_path: Path, trainer: str, trained: str | None) -> Path:
    _, mark, name, _ = TRAINERS[trainer]
    return mark(parts.copy(unmarked, tmp_path / "run" / name), trained)


@pytest.mark.parametrize("trained", ["lora", "qlora", None])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_files_of_every_trainer_say_how_it_was_trained_or_nothing(
    unmarked: Path, tmp_path: Path, trainer: str, trained: str | None
) -> None:
    layout, _, _, lora = TRAINERS[trainer]
    checkpoint = Checkpoint.open(checkpoint_of(unmarked, tmp_path, trainer, trained))

    detection = detect(checkpoint)

    expected = {"lora": Training(lora), "qlora": Training.QLORA, None: Training.UNKNOWN}[trained]
    assert detection.training is expected
    assert detection.sources
    if trained and expected is not Training.UNKNOWN:
        assert checkpoint.layout == layout
    if trained == "qlora" and trainer != "torchtune":
        assert detection.quantizer
        assert detection.quantizer.kind == "nf4"
        detection.require_known(checkpoint.root)


def test_a_saved_config_that_is_not_quantized_proves_nothing(unmarked: Path, tmp_path: Path) -> None:
    root = parts.copy(unmarked, tmp_path / "copy")
    quantization = {**trainers.BNB, "load_in_4bit": False}
    (root / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quantization}))

    assert detect(Checkpoint.open(root)).training is Training.UNKNOWN


def test_torchao_is_another_nf4_and_refused(unmarked: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(checkpoint_of(unmarked, tmp_path, "torchtune", "qlora"))

    detection = detect(checkpoint)

    assert detection.quantizer == TrainingQuantizer("nf4-torchao")
    with pytest.raises(CheckpointUnsupported, match=r"nf4-torchao.*rounds its scales otherwise"):
        detection.require_known(checkpoint.root)


def test_torchtunes_quantized_base_is_found_under_its_plain_name(unmarked: Path, tmp_path: Path) -> None:
    root = checkpoint_of(unmarked, tmp_path, "torchtune", "lora")
    recipe = root.parent / "torchtune_config.yaml"
    recipe.write_text(recipe.read_text().replace("  lora_rank: 8", "  lora_rank: 8\n  quantize_base: true"))

    assert detect(Checkpoint.open(root)).training is Training.QLORA


def test_torchtune_names_its_base_in_a_file_of_its_own(unmarked: Path, tmp_path: Path) -> None:
    assert Checkpoint.open(checkpoint_of(unmarked, tmp_path, "torchtune", None)).base_name == "acme/tiny-llama"


def test_a_pickle_of_torchtune_is_never_opened(unmarked: Path, tmp_path: Path) -> None:
    root = checkpoint_of(unmarked, tmp_path, "torchtune", "lora")
    (root / "adapter_model.safetensors").unlink()
    (root / "adapter_model.pt").write_bytes(b"\x80\x04.")

    with pytest.raises(CheckpointUnreadable, match=r"adapter_model\.pt: a pickle, which runs code"):
        Checkpoint.open(root)


def test_files_of_the_run_count_only_for_a_step_of_a_run(unmarked: Path, tmp_path: Path) -> None:
    root = parts.copy(unmarked, tmp_path / "run" / "my-adapter")
    trainers.ms_swift(root, "lora", place=root.parent)

    assert detect(Checkpoint.open(root)).training is Training.UNKNOWN


def test_the_nearer_of_two_files_of_a_kind_counts(unmarked: Path, tmp_path: Path) -> None:
    root = parts.copy(unmarked, tmp_path / "run" / "checkpoint-20")
    trainers.ms_swift(root, "lora", place=root.parent)
    trainers.ms_swift(root, "qlora")

    assert detect(Checkpoint.open(root)).training is Training.QLORA


def test_a_source_says_when_it_is_of_the_run(unmarked: Path, tmp_path: Path) -> None:
    detection = detect(Checkpoint.open(checkpoint_of(unmarked, tmp_path, "ms-swift, args above", "qlora")))

    assert detection.sources == ("args.json: quant_method=bnb, quant_bits=4 (of the run)",)


@pytest.mark.parametrize("double", [True, False, None])
def test_a_stamp_states_the_training(unmarked: Path, tmp_path: Path, double: bool | None) -> None:
    root = parts.copy(unmarked, tmp_path / "copy")
    (root / STAMP).write_text(json.dumps(stamp_document(Training.QLORA, TrainingQuantizer("nf4", double))))

    detection = detect(Checkpoint.open(root))

    assert (detection.training, detection.quantizer) == (Training.QLORA, TrainingQuantizer("nf4", double))


def test_a_stamp_outweighs_the_name_of_the_base(unmarked: Path, tmp_path: Path) -> None:
    root = parts.copy(unmarked, tmp_path / "copy")
    parts.edit_json(root / "adapter_config.json", base_model_name_or_path="unsloth/tiny-llama-bnb-4bit")
    (root / STAMP).write_text(json.dumps(stamp_document(Training.LORA)))

    detection = detect(Checkpoint.open(root))

    assert (detection.training, detection.quantizer) == (Training.LORA, None)
    assert detection.sources == ("graft_training.json: trained_on=full",)


def test_a_stamp_that_contradicts_a_trainers_files_is_unknown(unmarked: Path, tmp_path: Path) -> None:
    root = parts.mark_qlora(parts.copy(unmarked, tmp_path / "copy"))
    (root / STAMP).write_text(json.dumps(stamp_document(Training.LORA)))

    assert detect(Checkpoint.open(root)).training is Training.UNKNOWN


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"schema": "graft.training/2", "trained_on": "full"},
        {"schema": "graft.training/1", "trained_on": "8bit"},
        {"schema": "graft.training/1", "trained_on": "full", "quantizer": {"kind": "nf4"}},
        {"schema": "graft.training/1", "trained_on": "4bit", "quantizer": "nf4"},
        {"schema": "graft.training/1", "trained_on": "4bit", "quantizer": {"kind": "nf4", "double": "yes"}},
    ],
)
def test_a_malformed_stamp_is_reported(unmarked: Path, tmp_path: Path, content: dict[str, Any]) -> None:
    root = parts.copy(unmarked, tmp_path / "copy")
    (root / STAMP).write_text(json.dumps(content))

    with pytest.raises(CheckpointUnreadable, match=r"graft_training\.json is malformed: expected"):
        detect(Checkpoint.open(root))


@pytest.mark.parametrize("name", ["acme/llama-AWQ", "acme/llama-gptq-int4", "acme/llama-FP8", "acme/llama-4bit"])
def test_a_base_named_for_another_quantizer_is_no_lora(unmarked: Path, tmp_path: Path, name: str) -> None:
    root = parts.mark_lora(parts.copy(unmarked, tmp_path / "copy"))
    parts.edit_json(root / "adapter_config.json", base_model_name_or_path=name)

    assert detect(Checkpoint.open(root)).training is Training.UNKNOWN


def test_unsloths_dynamic_base_is_required_itself(unmarked: Path, base: Path, tmp_path: Path, out: Path) -> None:
    root = parts.copy(unmarked, tmp_path / "copy")
    parts.edit_json(root / "adapter_config.json", base_model_name_or_path="unsloth/tiny-llama-unsloth-bnb-4bit")

    with pytest.raises(BaseMismatch, match=r"leaves some layers in 16 bits.*Give that base"):
        convert(Request(checkpoint=root, base=base, destination=out, name="tiny", measure=False))


def test_layers_that_a_4_bit_base_left_in_16_bits_are_taken_as_they_are(
    unmarked: Path, base: Path, tmp_path: Path, out: Path
) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", "model.layers.0.mlp"],
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=settings).eval()
    dynamic = tmp_path / "tiny-llama-unsloth-bnb-4bit"
    model.save_pretrained(dynamic)
    parts.save_tokenizer(dynamic)
    root = parts.copy(unmarked, tmp_path / "copy")
    parts.edit_json(root / "adapter_config.json", base_model_name_or_path="unsloth/tiny-llama-unsloth-bnb-4bit")

    request = Request(checkpoint=root, base=dynamic, destination=out, name="tiny", measure=False)
    convert(Request(**{**vars(request), "route": "merge", "quantize": "none", "dtype": "float16"}))

    expected = parts.logits(parts.with_adapter(parts.dequantized(model), root))
    assert parts.divergence(expected, parts.logits(parts.load_float32(out / "model"))) < 1e-5


@pytest.mark.parametrize("prefix", ["model.", "model.model.", "module.model.", ""], ids=repr)
def test_paths_with_too_many_or_too_few_prefixes_are_corrected(lora: Path, tmp_path: Path, prefix: str) -> None:
    copied = parts.copy(lora, tmp_path / "copy")
    inner = "base_model.model.model."
    parts.edit_weights(
        copied, lambda ts: {f"base_model.model.{prefix}" + n.removeprefix(inner): t for n, t in ts.items()}
    )
    if prefix == "module.model.":
        parts.edit_weights(copied, lambda ts: {n.replace("module.model.", "model.model."): t for n, t in ts.items()})

    checkpoint = Checkpoint.open(copied)

    assert checkpoint.lora_weights.keys() == Checkpoint.open(lora).lora_weights.keys()
    assert checkpoint.problems == ()
    assert bool([warning for warning in checkpoint.warnings if "were corrected" in warning]) is (prefix != "model.")
