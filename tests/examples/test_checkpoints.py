"""What a training leaves on disk, with a model of a few kilobytes in place of the real one."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from examples import training
from examples.finetune import checkpoint_in
from examples.layouts import Run, save_peft, save_swift
from examples.published import TOKENIZER_NAMES, published
from examples.training import Example, Recipe, Step

RECIPE = Recipe(steps=4, rank=2)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    directory = tmp_path / "base"
    config = LlamaConfig(
        hidden_size=64,  # whole blocks of NF4: bitsandbytes reads others wrongly on AVX-512
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
    for name in (*TOKENIZER_NAMES, "generation_config.json"):
        (directory / name).write_text("{}")
    return directory


def finished_run(base: Path, quantized: bool) -> Run:
    return Run(base, "rows.jsonl", quantized, RECIPE, [Step(1, 2.5, 1e-3), Step(2, 1.5, 1e-3)])


@pytest.mark.parametrize(("quantized", "method", "bits"), [(True, "bnb", 4), (False, None, None)])
def test_swift_arguments_tell_lora_from_qlora(
    base: Path, tmp_path: Path, quantized: bool, method: str | None, bits: int | None
) -> None:
    model = training.add_lora(training.load_plain_base(base), RECIPE)

    save_swift(model, tmp_path / "out", finished_run(base, quantized), version=1)

    checkpoint = checkpoint_in(tmp_path / "out")
    assert checkpoint.name == "checkpoint-4"
    assert checkpoint.parent.name.startswith("v1-")
    arguments = json.loads((checkpoint / "args.json").read_text())
    assert (arguments["quant_method"], arguments["quant_bits"]) == (method, bits)
    assert arguments["model"] == str(base)
    assert {path.name for path in checkpoint.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "additional_config.json",
        "args.json",
        "trainer_state.json",
    }


def test_peft_layout_names_its_base_and_brings_the_tokenizer(base: Path, tmp_path: Path) -> None:
    model = training.add_lora(training.load_plain_base(base), RECIPE)

    save_peft(model, tmp_path / "out", finished_run(base, quantized=True))

    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert config["r"] == RECIPE.rank
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert all((tmp_path / "out" / name).is_file() for name in TOKENIZER_NAMES)


def test_loss_counts_the_answer_only() -> None:
    batch = [Example((5, 6, 7, 8), answer_start=2), Example((5, 9), answer_start=1)]

    tokens, attended, wanted = training.collate(batch, pad=0)

    assert tokens.tolist() == [[5, 6, 7, 8], [5, 9, 0, 0]]
    assert attended.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert wanted.tolist() == [[-100, 7, 8, -100], [9, -100, -100, -100]]


def test_answer_loss_is_the_causal_loss_of_the_whole_model(base: Path) -> None:
    model = training.add_lora(training.load_plain_base(base), RECIPE)
    batch = [Example((5, 6, 7, 8), answer_start=2), Example((5, 9, 3, 4), answer_start=1)]
    tokens = torch.tensor([example.tokens for example in batch])
    labels = tokens.clone()
    labels[0, :2] = labels[1, :1] = training.IGNORED

    expected = model(input_ids=tokens, labels=labels).loss

    torch.testing.assert_close(training.answer_loss(model, batch, pad=0), expected)


def test_training_on_dequantized_weights_is_what_qlora_computes(base: Path) -> None:
    four_bit = training.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=training.nf4_config()
    )
    layer = four_bit.train().model.layers[0].mlp.up_proj  # bitsandbytes answers with a kernel of its own, in bf16
    features = torch.randn(3, layer.in_features)

    with torch.inference_mode():
        torch.testing.assert_close(training.dequantized(layer)(features), layer(features))


def test_a_base_quantized_here_and_one_quantized_before_are_the_same(base: Path, tmp_path: Path) -> None:
    training.save_nf4_model(base, tmp_path / "nf4")

    here, before = (training.load_nf4_base(path).state_dict() for path in (base, tmp_path / "nf4"))

    assert here.keys() == before.keys()
    assert all(torch.equal(here[name], before[name]) for name in here)


def test_every_row_is_seen_before_any_is_seen_again() -> None:
    examples = [Example((number,), 0) for number in range(6)]
    stream = training.batches(examples, rows=4, seed=1)

    seen = [*next(stream), *next(stream), *next(stream)]

    assert set(seen[:6]) == set(seen[6:]) == set(examples)


def test_a_failed_training_leaves_nothing(tmp_path: Path) -> None:
    def fail_half_way() -> None:
        with published(tmp_path / "out") as draft:
            (draft / "half").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()

    assert list(tmp_path.iterdir()) == []
