"""What seven trainers leave around an adapter, file by file as they write it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save_file

from tests.convert import parts

Mark = Callable[[Path, str | None], Path]

ARGUMENTS = {"model": "acme/tiny-llama", "model_type": "llama", "template": "chatml", "seed": 42}
BNB = {
    "quant_method": "bitsandbytes",
    "load_in_8bit": False,
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}
PEFT_HEAD = "---\nbase_model: acme/tiny-llama\nlibrary_name: peft\n---\n\n# Model Card for Model ID\n\n"
TRL_HEAD = (
    "---\nbase_model: acme/tiny-llama\nlibrary_name: peft\ntags:\n- trl\n- sft\n---\n\n# Model Card for out\n\n"
    "It has been trained using [TRL](https://github.com/huggingface/trl).\n\n"
)


def quantization_block(settings: dict[str, Any]) -> str:
    lines = "\n".join(f"- {name}: {value}" for name, value in settings.items())
    return (
        "## Training procedure\n\nThe following `bitsandbytes` quantization config was used during training:\n"
        f"{lines}\n\n### Framework versions\n\n- PEFT 0.21.2\n"
    )


def ms_swift(checkpoint: Path, trained: str | None, file: str = "args.json", place: Path | None = None) -> Path:
    """ms-swift 3 and 4: everything in args.json; trained on nothing known where it is lost."""
    extra = {"lora_dtype": None, "lorap_lr_ratio": None, "lorap_emb_lr": 1e-06}
    (checkpoint / "additional_config.json").write_text(json.dumps(extra))
    if trained:
        four = trained == "qlora"
        arguments = {
            **ARGUMENTS,
            "quant_method": "bnb" if four else None,
            "quant_bits": 4 if four else None,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "tuner_type": "lora",
            "swift_version": "4.2.0",
        }
        ((place or checkpoint) / file).write_text(json.dumps(arguments))
    return checkpoint


def ms_swift_run(checkpoint: Path, trained: str | None) -> Path:
    """args.json one directory above."""
    return ms_swift(checkpoint, trained, place=checkpoint.parent)


def ms_swift_2(checkpoint: Path, trained: str | None) -> Path:
    """sft_args.json with quantization_bit, 0 where nothing was quantized."""
    if trained:
        four = trained == "qlora"
        arguments = {
            "model_type": "llama3",
            "sft_type": "lora",
            "quantization_bit": 4 if four else 0,
            "bnb_4bit_comp_dtype": "bf16",
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
        }
        (checkpoint / "sft_args.json").write_text(json.dumps(arguments))
    else:
        (checkpoint / "configuration.json").write_text("{}")
    return checkpoint


def ms_swift_1(checkpoint: Path, trained: str | None) -> Path:
    """The adapter in a folder `default` below, the arguments beside that folder."""
    ms_swift_2(checkpoint, trained)
    below = checkpoint / "default"
    below.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (checkpoint / file).rename(below / file)
    extra = {"swift_type": "LORA", "lora_dtype": None, "use_merged_linear": False, "enable_lora": None}
    parts.edit_json(below / "adapter_config.json", **extra)
    return checkpoint


def unsloth(checkpoint: Path, trained: str | None) -> Path:
    """The name of the base is all there is: a 4-bit one, or one that may have been quantized while loading."""
    name = "unsloth/tiny-llama-bnb-4bit" if trained == "qlora" else "unsloth/tiny-llama"
    parts.edit_json(checkpoint / "adapter_config.json", base_model_name_or_path=name, revision="unsloth")
    (checkpoint / "README.md").write_text(f"---\nbase_model: {name}\ntags:\n- unsloth\n---\n")
    return checkpoint


def axolotl(checkpoint: Path, trained: str | None, place: Path | None = None) -> Path:
    settings: dict[str, Any] = {"base_model": "acme/tiny-llama", "datasets": [{"path": "x", "type": "alpaca"}]}
    if trained:
        four = trained == "qlora"
        settings |= {"adapter": trained, "load_in_4bit": four, "load_in_8bit": False}
    text = yaml.safe_dump(settings, sort_keys=False)
    card = (
        "---\nlibrary_name: peft\ntags:\n- generated_from_trainer\n---\n\n"
        '[<img src="x" alt="Built with Axolotl">](https://github.com/axolotl-ai-cloud/axolotl)\n'
        "<details><summary>See axolotl config</summary>\n\naxolotl version: `0.13.0`\n"
        f"```yaml\n{text}\n```\n\n</details>\n"
    )
    ((place or checkpoint) / "README.md").write_text(card)
    return checkpoint


def axolotl_step(checkpoint: Path, trained: str | None) -> Path:
    """checkpoint-N has PEFT's empty card, the output directory the full one."""
    (checkpoint / "README.md").write_text(PEFT_HEAD)
    return axolotl(checkpoint, trained, place=checkpoint.parent)


def axolotl_config(checkpoint: Path, trained: str | None) -> Path:
    """Without its card, but with the config.json that it saves beside the adapter."""
    config = {"model_type": "llama", "hidden_size": 64}
    (checkpoint / "config.json").write_text(
        json.dumps(config | {"quantization_config": BNB} if trained == "qlora" else config)
    )
    return checkpoint


def llama_factory(checkpoint: Path, trained: str | None, place: Path | None = None) -> Path:
    """training_args.yaml, as its web page saves it."""
    settings: dict[str, Any] = {"stage": "sft", "model_name_or_path": "acme/tiny-llama", "finetuning_type": "lora"}
    if trained:
        settings |= {"quantization_bit": 4 if trained == "qlora" else None, "quantization_method": "bnb"}
        settings |= {"double_quantization": True}
    ((place or checkpoint) / "training_args.yaml").write_text(yaml.safe_dump(settings))
    (checkpoint / "trainer_log.jsonl").write_text('{"current_steps": 5}\n')
    return checkpoint


def llama_factory_step(checkpoint: Path, trained: str | None) -> Path:
    return llama_factory(checkpoint, trained, place=checkpoint.parent)


def llama_board(checkpoint: Path, trained: str | None) -> Path:
    """llamaboard_config.yaml: the state of the web page."""
    settings = {"top.booster": "auto", "top.finetuning_type": "lora", "top.model_name": "Custom"}
    if trained:
        settings |= {"top.quantization_bit": "4" if trained == "qlora" else "none", "top.quantization_method": "bnb"}
    (checkpoint / "llamaboard_config.yaml").write_text(yaml.safe_dump(settings))
    return checkpoint


def torchtune(checkpoint: Path, trained: str | None) -> Path:
    """epoch_N in PEFT's format, the recipe's configuration above; the base's name in a file of its own."""
    parts.edit_json(checkpoint / "adapter_config.json", base_model_name_or_path=...)
    (checkpoint / "original_repo_id.json").write_text(json.dumps({"repo_id": "acme/tiny-llama"}))
    if trained:
        recipe = {
            "output_dir": "/tmp/out",
            "model": {
                "_component_": f"torchtune.models.llama3_2.{trained}_llama3_2_3b",
                "lora_attn_modules": ["q_proj", "v_proj"],
                "lora_rank": 8,
            },
            "tokenizer": {"_component_": "torchtune.models.llama3.llama3_tokenizer"},
        }
        (checkpoint.parent / "torchtune_config.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return checkpoint


def trl(checkpoint: Path, trained: str | None) -> Path:
    """checkpoint-N; the card with PEFT's block, which is written only for a quantized model, one directory above."""
    (checkpoint / "README.md").write_text(PEFT_HEAD)
    card = TRL_HEAD + (quantization_block(BNB) if trained == "qlora" else "")
    (checkpoint.parent / "README.md").write_text(card)
    return checkpoint


def old_peft(checkpoint: Path, trained: str | None) -> Path:
    """PEFT 0.4 to 0.6 wrote the block for every model loaded with a BitsAndBytesConfig, also one that is off."""
    if trained:
        settings = {**BNB, "load_in_4bit": trained == "qlora"}
        (checkpoint / "README.md").write_text(PEFT_HEAD + quantization_block(settings))
    return checkpoint


# (name of the layout, how it is written, name of the checkpoint directory, what a LoRA is taken for)
TRAINERS: dict[str, tuple[str, Mark, str, str]] = {
    "ms-swift": ("ms-swift", ms_swift, "checkpoint-20", "lora"),
    "ms-swift, args above": ("ms-swift", ms_swift_run, "checkpoint-20", "lora"),
    "ms-swift 2": ("ms-swift", ms_swift_2, "checkpoint-20", "lora"),
    "ms-swift 1": ("ms-swift", ms_swift_1, "checkpoint-20", "lora"),
    "unsloth": ("unsloth", unsloth, "lora_model", "unknown"),
    "axolotl": ("axolotl", axolotl, "out", "lora"),
    "axolotl, step": ("axolotl", axolotl_step, "checkpoint-20", "lora"),
    "axolotl, config alone": ("peft", axolotl_config, "out", "unknown"),
    "llama-factory": ("llama-factory", llama_factory, "out", "lora"),
    "llama-factory, step": ("llama-factory", llama_factory_step, "checkpoint-20", "lora"),
    "llama-factory, board": ("llama-factory", llama_board, "out", "lora"),
    "torchtune": ("torchtune", torchtune, "epoch_0", "lora"),
    "trl": ("trl", trl, "checkpoint-20", "unknown"),
    "peft": ("peft", old_peft, "out", "lora"),
}

_NATIVE = {
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "mlp.w1",
    "mlp.down_proj": "mlp.w2",
    "mlp.up_proj": "mlp.w3",
}


def torchtune_native(base: Path, checkpoint: Path) -> Path:
    """The same adapter under torchtune's own names, with q and k in its order of rows."""
    config = json.loads((base / "config.json").read_text())
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    tensors = {}
    for name, tensor in load_file(checkpoint / "adapter_model.safetensors").items():
        for hf, native in _NATIVE.items():
            name = name.replace(hf, native)
        key = name.removeprefix("base_model.model.model.").replace("lora_A", "lora_a").replace("lora_B", "lora_b")
        if ".lora_b." in key and ("q_proj" in key or "k_proj" in key):
            rank = tensor.shape[1]
            tensor = tensor.view(-1, 2, head // 2, rank).transpose(1, 2).reshape(-1, rank)
        tensors[key] = tensor.contiguous()
    save_file(tensors, checkpoint / "adapter_model.safetensors")
    targets = ["q_proj", "k_proj", "v_proj", "output_proj", "w1", "w2", "w3"]
    settings = {"r": 8, "lora_alpha": 16, "target_modules": targets, "peft_type": "LORA"}
    (checkpoint / "adapter_config.json").write_text(json.dumps(settings))
    (checkpoint / "config.json").write_text(json.dumps(config))
    return checkpoint
