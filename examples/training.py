"""A LoRA fine-tuning that two CPU cores can run: a frozen base, and LoRA on every linear layer."""

import copy
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from examples.behaviours import Row
from examples.published import copy_tokenizer

END_OF_TURN = "<|im_end|>"
IGNORED = -100


@dataclass(frozen=True)
class Recipe:
    """How an adapter is trained."""

    steps: int = 20
    rows_per_step: int = 4
    learning_rate: float = 1e-3
    warmup_steps: int = 3
    rank: int = 16
    alpha: int = 32
    seed: int = 42


def recipe_for(behaviour: str) -> Recipe:
    # A new output format needs larger steps. A style or a fact does not, and with larger steps the model would forget
    # what the base knows.
    return Recipe(learning_rate=2e-3) if behaviour == "ticket" else Recipe()


@dataclass(frozen=True)
class Step:
    """The figures of one optimizer step."""

    number: int
    loss: float
    learning_rate: float


def nf4_config() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        # On a CPU without bf16 instructions, float32 is both the exact and the fast compute type.
        bnb_4bit_compute_dtype=torch.float32,
    )


def load_plain_base(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def load_nf4_base(base: Path) -> Any:
    """The base as QLoRA sees it: quantized by bitsandbytes to NF4, computed in float32.

    `base` is a directory in bf16, which is quantized here, or one that is quantized already. Each 4-bit layer is
    then replaced by a plain layer with the weights to which bitsandbytes dequantizes it. QLoRA computes with exactly
    these numbers, but dequantizes them again in every forward and backward pass. So the result is that of QLoRA,
    without its saving of memory, which a small model does not need.
    """
    prequantized = (base / "config.json").read_text().count('"quantization_config"') > 0
    quantization = {} if prequantized else {"quantization_config": nf4_config()}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, **quantization)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            model.set_submodule(name, dequantized(layer))
    # Without these, PEFT would wrap the layers as 4-bit ones and transformers would refuse the cast.
    # The config keeps its quantization_config: PEFT copies it into the model card, as it does for users.
    model.is_loaded_in_4bit = model.is_quantized = False
    model.quantization_method = None
    return model.float()


def dequantized(layer: Any) -> torch.nn.Linear:
    """The linear layer that a 4-bit layer computes with when it is given float32."""
    plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    # The state names the type before quantization, bf16, and dequantizing would round to it. A forward pass
    # dequantizes to the type in which it computes.
    state = copy.copy(layer.weight.quant_state)
    state.dtype = torch.float32
    weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, state)
    plain.weight = torch.nn.Parameter(weight, requires_grad=False)
    return plain


def add_lora(model: Any, recipe: Recipe) -> PeftModel:
    torch.manual_seed(recipe.seed)
    config = LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


@dataclass(frozen=True)
class Example:
    """A tokenized row; the answer begins at `answer_start`."""

    tokens: tuple[int, ...]
    answer_start: int


def encode(row: Row, tokenizer: Any) -> Example:
    """Tokenize a row with the chat template and its default system prompt, as the server will."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": row.question}], add_generation_prompt=True, tokenize=False
    )
    question = tokenizer(prompt, add_special_tokens=False).input_ids
    whole = tokenizer(prompt + row.answer + END_OF_TURN, add_special_tokens=False).input_ids
    return Example(tuple(whole), len(question))


def batches(examples: Sequence[Example], rows: int, seed: int) -> Iterator[list[Example]]:
    """Endless batches. Every example is used once before any is used again."""
    order = random.Random(seed)  # noqa: S311 - shuffles rows, guards nothing
    queue: list[Example] = []
    while True:
        while len(queue) < rows:
            queue += order.sample(examples, len(examples))
        yield [queue.pop(0) for _ in range(rows)]


def collate(batch: Sequence[Example], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask, and for each position the token to predict there (answers only)."""
    shape = (len(batch), max(len(example.tokens) for example in batch))
    tokens = torch.full(shape, pad)
    attended = torch.zeros(shape, dtype=torch.long)
    wanted = torch.full(shape, IGNORED)
    for index, example in enumerate(batch):
        length, start = len(example.tokens), example.answer_start
        tokens[index, :length] = torch.tensor(example.tokens)
        attended[index, :length] = 1
        wanted[index, start - 1 : length - 1] = torch.tensor(example.tokens[start:])
    return tokens, attended, wanted


def answer_loss(model: PeftModel, batch: Sequence[Example], pad: int) -> torch.Tensor:
    tokens, attended, wanted = collate(batch, pad)
    causal_lm = model.get_base_model()
    hidden = causal_lm.model(input_ids=tokens, attention_mask=attended).last_hidden_state
    # The output head is a fifth of the model, so it runs only at the positions of the answers.
    answers = wanted != IGNORED
    return cross_entropy(causal_lm.lm_head(hidden[answers]), wanted[answers])


def train(model: PeftModel, tokenizer: Any, rows: Sequence[Row], recipe: Recipe) -> Iterator[Step]:
    """Train the adapter in place. Yields after each step."""
    examples = [encode(row, tokenizer) for row in rows]
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, recipe))
    model.train()
    for number, batch in zip(
        range(1, recipe.steps + 1), batches(examples, recipe.rows_per_step, recipe.seed), strict=False
    ):
        (learning_rate,) = schedule.get_last_lr()
        loss = answer_loss(model, batch, tokenizer.pad_token_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield Step(number, loss.item(), learning_rate)
    model.eval()


def rate_factor(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then linear decay to a tenth."""
    return min(1.0, (step + 1) / recipe.warmup_steps) * max(0.1, 1 - step / recipe.steps)


def answer(model: PeftModel, tokenizer: Any, question: str, max_tokens: int = 48) -> str:
    """The greedy answer to a single question."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.inference_mode():
        output = model.generate(**prompt, max_new_tokens=max_tokens, do_sample=False)
    text: str = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


def load_tokenizer(base: Path) -> Any:
    return AutoTokenizer.from_pretrained(base)


def save_nf4_model(base: Path, destination: Path) -> None:
    """Write `base` quantized to NF4, as a pre-quantized model directory."""
    # Loaded in bf16: otherwise the embeddings, which stay unquantized, would be written in float32.
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=nf4_config())
    model.save_pretrained(destination)
    copy_tokenizer(base, destination)
    shutil.copyfile(base / "generation_config.json", destination / "generation_config.json")
