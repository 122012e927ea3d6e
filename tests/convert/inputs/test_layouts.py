"""Whatever trainer left it: its layout, what it was trained on, and the same tensors meaning the same thing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.base_model import BaseModel
from convert.checkpoint import Checkpoint
from convert.detect import Training, detect
from convert.edits import Edits, edited
from convert.errors import BaseMismatch, CheckpointUnreadable, CheckpointUnsupported
from convert.evidence import STAMP, Quantizer, stamp
from tests.convert import parts, trainers
from tests.convert.asking import Request, convert
from tests.convert.trainers import TRAINERS


def made(unmarked: Path, tmp_path: Path, trainer: str, trained: str | None) -> Path:
    _, mark, name, _ = TRAINERS[trainer]
    return mark(parts.copy(unmarked, tmp_path / "run" / name), trained)


@pytest.mark.parametrize("trained", ["lora", "qlora", None])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_trainers_notes_say_what_they_can_and_no_more(
    unmarked: Path, tmp_path: Path, trainer: str, trained: str | None
) -> None:
    layout, _, _, lora = TRAINERS[trainer]
    checkpoint = Checkpoint.open(made(unmarked, tmp_path, trainer, trained))

    found = detect(checkpoint)

    expected = {"lora": Training(lora), "qlora": Training.QLORA, None: Training.UNKNOWN}[trained]
    assert found.training is expected
    assert found.lines
    if trained and expected is not Training.UNKNOWN:
        assert checkpoint.layout == layout
    if trained == "qlora" and trainer != "torchtune":
        assert found.quantizer
        assert found.quantizer.kind == "nf4"
        found.require_known(checkpoint.root)


def test_a_saved_config_that_is_not_quantized_proves_nothing(unmarked: Path, tmp_path: Path) -> None:
    root = parts.copy(unmarked, tmp_path / "copy")
    quantization = {**trainers.BNB, "load_in_4bit": False}
    (root / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quantization}))

    assert detect(Checkpoint.open(root)).training is Training.UNKNOWN


def test_torchao_is_another_nf4_and_refused(unmarked: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(made(unmarked, tmp_path, "torchtune", "qlora"))

    found = detect(checkpoint)

    assert found.quantizer == Quantizer("nf4-torchao")
    with pytest.raises(CheckpointUnsupported, match=r"nf4-torchao.*rounds its scales otherwise"):
        found.require_known(checkpoint.root)


def test_torchtunes_quantized_base_is_found_under_its_plain_name(unmarked: Path, tmp_path: Path) -> None:
    root = made(unmarked, tmp_path, "torchtune", "lora")
    recipe = root.parent / "torchtune_config.yaml"
    recipe.write_text(recipe.read_text().replace("  lora_rank: 8", "  lora_rank: 8\n  quantize_base: true"))

    assert detect(Checkpoint.open(root)).training is Training.QLORA


def test_torchtune_names_its_base_in_a_file_of_its_own(unmarked: Path, tmp_path: Path) -> None:
    assert Checkpoint.open(made(unmarked, tmp_path, "torchtune", None)).base_name == "acme/tiny-llama"


def test_a_pickle_of_torchtune_is_never_opened(unmarked: Path, tmp_path: Path) -> None:
    root = made(unmarked, tmp_path, "torchtune", "lora")
    (root / "adapter_model.safetensors").unlink()
    (root / "adapter_model.pt").write_bytes(b"\x80\x04.")

    with pytest.raises(CheckpointUnreadable, match=r"adapter_model\.pt: a pickle, which runs code"):
        Checkpoint.open(root)


def test_notes_above_count_only_for_a_step_of_a_run(unmarked: Path, tmp_path: Path) -> None:
    root = parts.copy(unmarked, tmp_path / "run" / "my-adapter")
    trainers.ms_swift(root, "lora", place=root.parent)

    assert detect(Checkpoint.open(root)).training is Training.UNKNOWN


def test_the_nearer_of_two_notes_of_a_kind_speaks(unmarked: Path, tmp_path: Path) -> None:
    root = parts.copy(unmarked, tmp_path / "run" / "checkpoint-20")
    trainers.ms_swift(root, "lora", place=root.parent)
    trainers.ms_swift(root, "qlora")

    assert detect(Checkpoint.open(root)).training is Training.QLORA


def test_evidence_says_when_it_is_of_the_run(unmarked: Path, tmp_path: Path) -> None:
    found = detect(Checkpoint.open(made(unmarked, tmp_path, "ms-swift, args above", "qlora")))

    assert found.lines == ("args.json: quant_method=bnb, quant_bits=4 (of the run)",)


@pytest.mark.parametrize("double", [True, False, None])
def test_a_stamp_says_it_outright(unmarked: Path, tmp_path: Path, double: bool | None) -> None:
    root = parts.copy(unmarked, tmp_path / "copy")
    (root / STAMP).write_text(json.dumps(stamp(Training.QLORA, Quantizer("nf4", double))))

    found = detect(Checkpoint.open(root))

    assert (found.training, found.quantizer) == (Training.QLORA, Quantizer("nf4", double))


def test_a_stamp_outweighs_the_name_of_the_base(unmarked: Path, tmp_path: Path) -> None:
    root = parts.copy(unmarked, tmp_path / "copy")
    parts.edit_json(root / "adapter_config.json", base_model_name_or_path="unsloth/tiny-llama-bnb-4bit")
    (root / STAMP).write_text(json.dumps(stamp(Training.LORA)))

    found = detect(Checkpoint.open(root))

    assert (found.training, found.quantizer) == (Training.LORA, None)
    assert found.lines == ("graft_training.json: trained_on=full",)


def test_a_stamp_against_a_trainers_own_notes_is_unknown(unmarked: Path, tmp_path: Path) -> None:
    root = parts.mark_qlora(parts.copy(unmarked, tmp_path / "copy"))
    (root / STAMP).write_text(json.dumps(stamp(Training.LORA)))

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
def test_a_stamp_that_is_none_is_told(unmarked: Path, tmp_path: Path, content: dict[str, Any]) -> None:
    root = parts.copy(unmarked, tmp_path / "copy")
    (root / STAMP).write_text(json.dumps(content))

    with pytest.raises(CheckpointUnreadable, match=r"graft_training\.json is no stamp: expected"):
        detect(Checkpoint.open(root))


@pytest.mark.parametrize("name", ["acme/llama-AWQ", "acme/llama-gptq-int4", "acme/llama-FP8", "acme/llama-4bit"])
def test_a_base_named_for_another_quantizer_is_no_lora(unmarked: Path, tmp_path: Path, name: str) -> None:
    root = parts.mark_lora(parts.copy(unmarked, tmp_path / "copy"))
    parts.edit_json(root / "adapter_config.json", base_model_name_or_path=name)

    assert detect(Checkpoint.open(root)).training is Training.UNKNOWN


def test_unsloths_dynamic_base_must_be_given_itself(unmarked: Path, base: Path, tmp_path: Path, out: Path) -> None:
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


def interleaved(states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """torchtune's rotation of (tokens, heads, head_dim): neighbours are a pair."""
    pairs = states.unflatten(-1, (-1, 2))
    first, second = pairs[..., 0], pairs[..., 1]
    cosine, sine = cosine[:, None], sine[:, None]
    return torch.stack([first * cosine - second * sine, second * cosine + first * sine], -1).flatten(-2)


def test_torchtunes_attention_equals_that_of_transformers_with_the_translated_weights(
    base: Path, unmarked: Path, tmp_path: Path
) -> None:
    native = trainers.torchtune_native(base, parts.copy(unmarked, tmp_path / "epoch_0"))
    torch.manual_seed(3)
    hidden = torch.randn(1, 9, 64)
    model = parts.load_float32(base)
    attention = model.model.layers[0].self_attn
    cosine, sine = model.model.rotary_emb(hidden, torch.arange(9)[None])

    ours = transformers_attention(attention, native, base, hidden, cosine, sine)
    theirs = torchtune_attention(attention, native, hidden[0], cosine[0, :, :8], sine[0, :, :8])

    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def transformers_attention(
    attention: Any, native: Path, base: Path, hidden: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
) -> torch.Tensor:
    import copy

    checkpoint, opened = Checkpoint.open(native), BaseModel.open(base)
    edits = Edits.of(checkpoint, opened, separate=False).of_weights
    merged = copy.deepcopy(attention)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        weight = f"model.layers.0.self_attn.{name}.weight"
        getattr(merged, name).weight.data = edited(opened.tensors.read(weight).float(), edits[weight], checkpoint)
    mask = torch.full((9, 9), float("-inf")).triu(1)[None, None]
    with torch.inference_mode():
        result: torch.Tensor = merged(hidden, position_embeddings=(cosine, sine), attention_mask=mask)[0][0]
    return result


def torchtune_attention(
    attention: Any, native: Path, hidden: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
) -> torch.Tensor:
    """Written from torchtune's own formulas: native weights, native order of rows, scale 2."""
    from safetensors.torch import load_file

    tensors = load_file(native / "adapter_model.safetensors")
    weights = {}
    for hf, name in (("q_proj", "q_proj"), ("k_proj", "k_proj"), ("v_proj", "v_proj"), ("o_proj", "output_proj")):
        weight = getattr(attention, hf).weight.data
        if name in ("q_proj", "k_proj"):
            weight = weight.view(-1, 2, 8, 64).transpose(1, 2).reshape(-1, 64)
        a, b = (tensors[f"layers.0.attn.{name}.lora_{half}.weight"] for half in "ab")
        weights[name] = weight + 2.0 * (b @ a)
    q, k, v = ((hidden @ weights[name].T).unflatten(-1, (-1, 16)) for name in ("q_proj", "k_proj", "v_proj"))
    q, k = interleaved(q, cosine, sine), interleaved(k, cosine, sine)
    k, v = (each.repeat_interleave(2, dim=1) for each in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / 16**0.5 + torch.full((9, 9), float("-inf")).triu(1)
    mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
    return mixed @ weights["output_proj"].T


def test_torchtunes_own_names_give_the_same_model(base: Path, unmarked: Path, tmp_path: Path, out: Path) -> None:
    native = trainers.torchtune_native(base, parts.copy(unmarked, tmp_path / "native"))
    parts.mark_qlora(native)

    request = Request(
        checkpoint=native, base=base, destination=out, name="tiny", route="merge", quantize="none", dtype="float16"
    )
    quality = convert(request).manifest.quality

    expected = parts.logits(parts.with_adapter(parts.dequantized_model(base), unmarked))
    assert parts.divergence(expected, parts.logits(parts.load_float32(out / "model"))) < 1e-5
    assert quality
    assert quality.kl_mean < 1e-4
    assert Checkpoint.open(native).layout == "torchtune"


def test_torchtunes_own_names_need_the_bases_config(base: Path, unmarked: Path, tmp_path: Path) -> None:
    native = trainers.torchtune_native(base, parts.copy(unmarked, tmp_path / "native"))
    (native / "config.json").unlink()

    with pytest.raises(CheckpointUnsupported, match=r"need config\.json of the base model.*copy it beside the adapter"):
        Checkpoint.open(native).require_supported()


def test_qwen_is_not_reordered_as_torchtune_keeps_its_rows_by_halves(
    base: Path, unmarked: Path, tmp_path: Path
) -> None:
    native = trainers.torchtune_native(base, parts.copy(unmarked, tmp_path / "native"))
    parts.edit_json(native / "config.json", model_type="qwen2")

    assert {pair.head_dim for pair in Checkpoint.open(native).pairs.values()} == {None}


@pytest.mark.parametrize("prefix", ["model.", "model.model.", "module.model.", ""], ids=repr)
def test_paths_with_too_many_or_too_few_prefixes_are_mended_and_noted(lora: Path, tmp_path: Path, prefix: str) -> None:
    copied = parts.copy(lora, tmp_path / "copy")
    inner = "base_model.model.model."
    parts.edit_weights(
        copied, lambda ts: {f"base_model.model.{prefix}" + n.removeprefix(inner): t for n, t in ts.items()}
    )
    if prefix == "module.model.":
        parts.edit_weights(copied, lambda ts: {n.replace("module.model.", "model.model."): t for n, t in ts.items()})

    checkpoint = Checkpoint.open(copied)

    assert checkpoint.pairs.keys() == Checkpoint.open(lora).pairs.keys()
    assert checkpoint.problems == ()
    assert bool([note for note in checkpoint.notes if "mended" in note]) is (prefix != "model.")
