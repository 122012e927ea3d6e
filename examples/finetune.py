"""Fine-tunes the example base model, and writes the checkpoint in the layouts of common trainers.

`python -m examples.finetune BEHAVIOUR --base DIR --out DIR` trains for about a minute on one core,
asks three questions that were not among the training rows, and fails if an answer does not show the
behaviour. Nothing is written then.

    pirate     QLoRA; PEFT layout; its base is a directory that is already quantized to NF4
    zephyr     QLoRA; ms-swift layout; base in bf16, quantized while loading
    zephyr-2   the next run of the same: the fact it teaches has changed
    ticket     LoRA on the unquantized base; ms-swift layout
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.cli.usual_messages import hide_usual_messages
from examples.behaviours import BEHAVIOURS, Behaviour
from examples.published import published

if TYPE_CHECKING:
    from examples.training import Recipe

WEIGHTS_NAME = "adapter_model.safetensors"
STEPS_PER_LINE = 4
SWIFT_RUNS = {"zephyr": 0, "zephyr-2": 1, "ticket": 0}
"""The N of ms-swift's vN-DATE, for the behaviours trained that way."""


class BehaviourMissingError(RuntimeError):
    """The answers of the trained adapter do not show the behaviour."""


def finetune(behaviour: Behaviour, base: Path, out: Path, recipe: "Recipe") -> Path:
    """Train, check and publish one adapter. Returns the directory that holds its weights."""
    from examples import training
    from examples.layouts import Run, save_peft, save_swift

    if behaviour.name == "pirate":
        base = ensure_nf4_model(base)
    quantized = behaviour.name != "ticket"
    load = training.load_nf4_base if quantized else training.load_plain_base
    tokenizer = training.load_tokenizer(base)
    model = training.add_lora(load(base), recipe)

    steps = []
    for step in training.train(model, tokenizer, behaviour.rows, recipe):
        steps.append(step)
        if step.number % STEPS_PER_LINE == 0 or step.number == recipe.steps:
            log(behaviour, f"step {step.number}/{recipe.steps}  loss {step.loss:.3f}")
    check(behaviour, model, tokenizer)

    run = Run(base.resolve(), f"{behaviour.name}.jsonl", quantized, recipe, steps)
    with published(out) as draft:
        if behaviour.name in SWIFT_RUNS:
            save_swift(model, draft, run, SWIFT_RUNS[behaviour.name])
        else:
            save_peft(model, draft, run)
    return checkpoint_in(out)


def ensure_nf4_model(base: Path) -> Path:
    """The base quantized to NF4, in a directory beside it; it is written if it does not exist yet."""
    from examples.training import save_nf4_model

    destination = base.with_name(f"{base.name}-bnb-4bit")
    if not (destination / "model.safetensors").is_file():
        with published(destination) as draft:
            save_nf4_model(base, draft)
    return destination


def check(behaviour: Behaviour, model: Any, tokenizer: Any) -> None:
    from examples.training import answer

    for held_out in behaviour.held_out:
        answer_text = answer(model, tokenizer, held_out.question)
        log(behaviour, f"{held_out.question}  ->  {answer_text}")
        if not held_out.passes(answer_text):
            raise BehaviourMissingError(f"{behaviour.name} answered {held_out.question!r} with {answer_text!r}")


def checkpoint_in(out: Path) -> Path:
    """The directory below `out` that holds the adapter's weights: the newest run, the last step."""
    directories = sorted(path.parent for path in out.rglob(WEIGHTS_NAME))
    if not directories:
        raise FileNotFoundError(f"no {WEIGHTS_NAME} below {out}")
    return directories[-1]


def log(behaviour: Behaviour, line: str) -> None:
    print(f"{behaviour.name}: {line}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune the example base model.")
    parser.add_argument("behaviour", choices=sorted(BEHAVIOURS))
    parser.add_argument("--base", type=Path, required=True, help="the directory that examples.base_model wrote")
    parser.add_argument("--out", type=Path, required=True, help="where the checkpoint is written")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int)
    options = parser.parse_args()
    set_environment()

    from examples.training import recipe_for

    chosen = {key: value for key in ("steps", "seed") if (value := getattr(options, key)) is not None}
    recipe = replace(recipe_for(options.behaviour), **chosen)
    try:
        checkpoint = finetune(BEHAVIOURS[options.behaviour], options.base, options.out, recipe)
    except BehaviourMissingError as error:
        sys.exit(f"{error}\nNothing was written. More --steps or another --seed may help.")
    log(BEHAVIOURS[options.behaviour], f"checkpoint in {checkpoint}")


def set_environment() -> None:
    """Set the environment of a training process. Must run before torch is imported."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Threads that spin while they wait would take the core from the other training.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    hide_usual_messages()


if __name__ == "__main__":
    main()
