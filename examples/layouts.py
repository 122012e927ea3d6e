"""Writes checkpoints in the directory layouts of trainers.

The files that PyTorch would pickle (optimizer.pt, scheduler.pt, rng_state.pth, training_args.bin) are left
out, because serving needs none of them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from peft import PeftModel

from examples.published import copy_tokenizer
from examples.training import Recipe, Step

SWIFT_VERSION = "4.2.0"


@dataclass(frozen=True)
class Run:
    """A finished training, as its files describe it."""

    base: Path
    dataset: str
    quantized: bool
    recipe: Recipe
    steps: Sequence[Step]


def save_peft(model: PeftModel, directory: Path, run: Run) -> None:
    """PEFT's own layout with the tokenizer beside it, as the scripts of unsloth write it."""
    save_adapter(model, directory, run.base)
    copy_tokenizer(run.base, directory)


def save_swift(model: PeftModel, directory: Path, run: Run, version: int) -> None:
    """ms-swift's layout: vN-DATE/checkpoint-K, the arguments in args.json."""
    run_name = f"v{version}-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
    checkpoint = directory / run_name / f"checkpoint-{run.recipe.steps}"
    save_adapter(model, checkpoint, run.base)
    write_json(
        checkpoint / "additional_config.json",
        {"lora_dtype": None, "lorap_lr_ratio": None, "lorap_emb_lr": 1e-06},
    )
    write_json(checkpoint / "trainer_state.json", trainer_state(run))
    for directory in (checkpoint, checkpoint.parent):
        write_json(directory / "args.json", swift_arguments(run))
    log = "".join(json.dumps(log_entry(step)) + "\n" for step in run.steps)
    (checkpoint.parent / "logging.jsonl").write_text(log)


def save_adapter(model: PeftModel, directory: Path, base: Path) -> None:
    model.peft_config["default"].base_model_name_or_path = str(base)
    # By default PEFT loads the base model's configuration to see whether the vocabulary was resized.
    model.save_pretrained(directory, save_embedding_layers=False)


def swift_arguments(run: Run) -> dict[str, Any]:
    """The part of ms-swift's args.json that says how the adapter was trained."""
    return {
        "model": str(run.base),
        "model_type": "llama",
        "model_revision": None,
        "task_type": "causal_lm",
        "torch_dtype": "bfloat16" if run.quantized else "float32",
        "attn_impl": None,
        "quant_method": "bnb" if run.quantized else None,
        "quant_bits": 4 if run.quantized else None,
        "hqq_axis": None,
        # ms-swift writes its defaults of these three also where nothing was quantized.
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": None,
        "template": "chatml",
        "system": None,
        "max_length": 8192,
        "dataset": [run.dataset],
        "tuner_backend": "peft",
        "tuner_type": "lora",
        "adapters": [],
        "target_modules": ["all-linear"],
        "lora_rank": run.recipe.rank,
        "lora_alpha": run.recipe.alpha,
        "lora_dropout": 0.0,
        "lora_bias": "none",
        "lora_dtype": None,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": [],
        "seed": run.recipe.seed,
        "learning_rate": run.recipe.learning_rate,
        "per_device_train_batch_size": run.recipe.rows_per_step,
        "gradient_accumulation_steps": 1,
        "max_steps": run.recipe.steps,
        "swift_version": SWIFT_VERSION,
    }


def trainer_state(run: Run) -> dict[str, Any]:
    return {
        "best_global_step": None,
        "best_metric": None,
        "best_model_checkpoint": None,
        "global_step": run.recipe.steps,
        "is_hyper_param_search": False,
        "is_local_process_zero": True,
        "is_world_process_zero": True,
        "log_history": [log_entry(step) for step in run.steps],
        "logging_steps": 1,
        "max_steps": run.recipe.steps,
        "train_batch_size": run.recipe.rows_per_step,
    }


def log_entry(step: Step) -> dict[str, Any]:
    return {"loss": round(step.loss, 6), "learning_rate": step.learning_rate, "step": step.number}


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
