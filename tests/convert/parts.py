"""Real parts in small: a two-layer Llama with a tokenizer, adapters made by PEFT, 4-bit bases by bitsandbytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from convert.inputs.base_model import BaseModel
from convert.quantization.compressed import Compressed, CompressedName

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCABULARY = 272
PROMPT = torch.tensor([[1, 17, 99, 140, 3, 250, 61, 8, 200, 33, 77, 5]])
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


def save_tokenizer(
    directory: Path, *, tokens: tuple[str, ...] = (), template: str | None = TEMPLATE, eos: str = "</s>"
) -> None:
    """`tokens`: added tokens besides <s> and </s>, which have the ids 0 and 1."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", *tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the rain in spain stays mainly in the plain"] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos)
    fast.chat_template = template
    fast.save_pretrained(directory)


def save_base(
    directory: Path,
    *,
    tied: bool,
    layers: int = 2,
    hidden: int = 64,
    vocabulary: int = VOCABULARY,
    dtype: str = "bfloat16",
    biases: bool = False,
) -> Path:
    torch.manual_seed(7)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        initializer_range=0.15,
        bos_token_id=0,
        eos_token_id=1,
        attention_bias=biases,
        mlp_bias=biases,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def save_quantized(base: Path, directory: Path, *, double: bool = True) -> Path:
    """As `model.save_pretrained` leaves a model that was loaded with load_in_4bit."""
    load_quantized(base, double=double).save_pretrained(directory)
    for file in (*base.glob("token*"), *base.glob("chat_template*")):
        shutil.copy(file, directory)
    return directory


def load_quantized(base: Path, *, double: bool = True) -> Any:
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return auto_class(base).from_pretrained(base, dtype=torch.bfloat16, quantization_config=settings).eval()


def auto_class(directory: Path) -> Any:
    """transformers' factory for the model of a directory."""
    is_multimodal = hasattr(AutoConfig.from_pretrained(directory), "vision_config")
    return AutoModelForImageTextToText if is_multimodal else AutoModelForCausalLM


def save_compressed(base: Path, directory: Path, name: CompressedName) -> Path:
    """The base with its linear layers stored by our own scheme, as the routes write it."""
    opened = BaseModel.open(base)
    linears = [linear for linear in opened.linears.values() if not linear.is_head]
    scheme = Compressed.fitting(name, (linear.in_features for linear in linears), opened.dtype)
    directory.mkdir()
    tensors = {spec.name: opened.tensors.read(spec.name) for spec in opened.other_specs}
    tensors |= {linear.weight: opened.read(linear) for linear in opened.linears.values() if linear.is_head}
    for linear in linears:
        tensors |= scheme.quantize(linear.module, opened.read(linear))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps({**opened.config, "quantization_config": scheme.config()}))
    for file in (*base.glob("token*"), *base.glob("chat_template*"), *base.glob("generation*")):
        shutil.copy(file, directory)
    return directory


def save_adapter(base: Path, directory: Path, *, strength: float = 0.2, **settings: Any) -> Path:
    """A trained-looking adapter, in PEFT's own files. `settings` go to LoraConfig."""
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = {"r": 8, "lora_alpha": 16, "target_modules": LINEARS, "task_type": "CAUSAL_LM", **settings}
    adapted = get_peft_model(model, LoraConfig(**config))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=strength / parameter.shape[1] ** 0.5)
    adapted.save_pretrained(directory, save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)
    edit_json(directory / "adapter_config.json", base_model_name_or_path="acme/tiny-llama")
    return directory


def mark_qlora(checkpoint: Path, *, double: bool = True) -> Path:
    """The notes ms-swift leaves beside a QLoRA adapter."""
    arguments = {
        "model": "acme/tiny-llama",
        "quant_method": "bnb",
        "quant_bits": 4,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double,
    }
    (checkpoint / "args.json").write_text(json.dumps(arguments))
    return checkpoint


def mark_lora(checkpoint: Path) -> Path:
    (checkpoint / "args.json").write_text(
        json.dumps({"model": "acme/tiny-llama", "quant_method": None, "quant_bits": None})
    )
    return checkpoint


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; a value of `...` removes the key."""
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in document.items() if value is not ...}))


def edit_weights(checkpoint: Path, change: Any) -> None:
    """`change` gets the adapter's tensors by name and returns those to be stored instead."""
    path = checkpoint / "adapter_model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path)


def copy(source: Path, destination: Path) -> Path:
    return Path(shutil.copytree(source, destination))


def dequantized_model(base: Path, *, double: bool = True) -> Any:
    """A float32 model with the weights QLoRA trains against: quantized by transformers, dequantized by bitsandbytes."""
    return dequantized(load_quantized(base, double=double))


def load_stored(directory: Path) -> Any:
    """A float32 model of a directory whose linear layers are stored as NF4."""
    return dequantized(auto_class(directory).from_pretrained(directory, dtype=torch.bfloat16))


def float32_of(opened: BaseModel) -> Any:
    """A float32 model of a directory in any format, with the weights that we say are stored there."""
    config = {name: value for name, value in opened.config.items() if name != "quantization_config"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).float()
    weights = {spec.name: opened.tensors.read(spec.name).float() for spec in opened.other_specs}
    weights |= {linear.weight: opened.read(linear).float() for linear in opened.linears.values()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


def dequantized(quantized: Any) -> Any:
    """transformers' own `dequantize()` would round the weights to bfloat16."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    config = quantized.config.to_dict()
    config.pop("quantization_config")
    model = type(quantized)(type(quantized.config)(**config)).float()
    for name, module in quantized.named_modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            state.dtype = torch.float32
            model.get_submodule(name).weight.data = dequantize_4bit(module.weight.data, state)
        elif getattr(module, "weight", None) is not None:
            model.get_submodule(name).weight.data = module.weight.data.float()
        if getattr(module, "bias", None) is not None:
            model.get_submodule(name).bias.data = module.bias.data.float()
    model.tie_weights()
    return model.eval()


def with_adapter(model: Any, checkpoint: Path) -> Any:
    return PeftModel.from_pretrained(model, str(checkpoint)).eval()


def load_float32(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def logits(model: Any, prompt: torch.Tensor = PROMPT) -> torch.Tensor:
    with torch.inference_mode():
        return model(prompt).logits[0].float()


def divergence(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """Mean KL(expected || actual) in nats."""
    expected_log, actual_log = expected.double().log_softmax(-1), actual.double().log_softmax(-1)
    return float((expected_log.exp() * (expected_log - actual_log)).sum(-1).mean())


def tree(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def remove(root: Path) -> None:
    shutil.rmtree(root)
