"""Distillation of one function, the teacher, into the LoRA matrices of another, the student.

The teacher runs once. Its distributions are kept, so that the student alone is in memory while it is trained.

The loss is the mean over positions of KL(teacher || student) of the next token. For training, a distribution of the
teacher is kept as its most probable tokens and the sum of all others. Merging outcomes never enlarges a divergence, so
this coarse KL is a lower bound of the full KL. In practice it is within 1e-2 of it, at 1/200 of the memory.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from convert.progress import Progress
from convert.quality.models.output_layers import logits_of

if TYPE_CHECKING:
    import torch

_TOP_TOKENS = 256
_PADDING_ID = 0

LoraMatrices = dict[str, tuple["torch.Tensor", "torch.Tensor"]]
"""Module -> A (rank, in) and B (out, rank) of a delta of scale 1, float32."""


@dataclass(frozen=True)
class DistillationExample:
    """A row of token ids (tokens) with the teacher's coarse distribution after every position but the last.

    `top_ids`: ids (tokens - 1, top) of the teacher's most probable tokens. `log_probs` (tokens - 1, top + 1): of those
    tokens, and in the last column of all others together.
    """

    token_ids: torch.Tensor
    top_ids: torch.Tensor
    log_probs: torch.Tensor

    @classmethod
    def of(cls, row: torch.Tensor, log_probs: torch.Tensor) -> DistillationExample:
        """From a row (1, tokens) and the teacher's full log-probabilities (tokens - 1, vocabulary)."""
        import torch

        top = log_probs.topk(min(_TOP_TOKENS, log_probs.shape[1] - 1), dim=-1)
        others = _logsumexp_of_others(log_probs, top.indices)
        return cls(row.reshape(-1).cpu(), top.indices.int().cpu(), torch.cat([top.values, others], dim=-1).cpu())


@dataclass(frozen=True)
class TrainingSchedule:
    """How long and how fast the student is trained, with AdamW on batches of whole rows.

    The learning rate rises over the first tenth of the steps, then falls along a cosine to a tenth of its maximum.
    Every `check_every` steps the validation examples are measured; after `patience` measurements without a new minimum
    the training stops.
    """

    steps: int
    rows_per_step: int = 4
    learning_rate: float = 5e-4
    check_every: int = 5
    patience: int = 4
    seed: int = 0

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        warmup_steps = max(1, self.steps // 10)
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * min(1.0, (step + 1) / warmup_steps) * (0.1 + 0.9 * cosine)


@dataclass(frozen=True)
class DistillationResult:
    """The matrices with the smallest validation KL, the step after which it was measured, and how many steps ran.

    `best_step` is 0 where no step was better than the start.
    """

    matrices: LoraMatrices
    best_step: int
    steps_run: int


class Student:
    """A frozen transformers model with trainable float32 LoRA matrices of scale 1 on `modules`."""

    def __init__(self, model: Any, modules: Sequence[str], rank: int) -> None:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(modules), task_type="CAUSAL_LM")
        self.model = get_peft_model(model, config).eval()
        self._modules = tuple(modules)

    @property
    def parameters(self) -> list[Any]:
        """The trainable parameters: A and B of each module."""
        return [parameter for module in self._modules for parameter in self._parameters_of(module)]

    @property
    def matrices(self) -> LoraMatrices:
        """Copies of the LoRA matrices, on the CPU."""
        return {
            module: (a.detach().cpu().clone(), b.detach().cpu().clone())
            for module in self._modules
            for a, b in [self._parameters_of(module)]
        }

    def load(self, matrices: LoraMatrices) -> None:
        """Overwrite the LoRA matrices of the named modules."""
        import torch

        with torch.no_grad():
            for module, (a, b) in matrices.items():
                parameter_a, parameter_b = self._parameters_of(module)
                parameter_a.copy_(a)
                parameter_b.copy_(b)

    def _parameters_of(self, module: str) -> tuple[Any, Any]:
        layer = self.model.get_base_model().get_submodule(module)
        return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def distill(
    student: Student,
    training: Sequence[DistillationExample],
    validation: Sequence[DistillationExample],
    schedule: TrainingSchedule,
    progress: Progress,
) -> DistillationResult:
    """Train the student's matrices on `training`; stop when the KL of `validation` no longer falls.

    Deterministic on one machine for one seed. The student is left with the best matrices.
    """
    import torch

    optimizer = torch.optim.AdamW(student.parameters, lr=schedule.learning_rate, weight_decay=0.0)
    best = DistillationResult(student.matrices, best_step=0, steps_run=0)
    start_kl = best_kl = divergence(student, validation)
    label = f"distilling, from a KL of {start_kl:.2g}"
    batches, padded_length = _batches(training, schedule), max(len(example.token_ids) for example in training)
    step = checks_without_gain = 0
    for step in range(1, schedule.steps + 1):
        progress(label, step - 1, schedule.steps)
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate_at(step - 1)
        _train_step(student, optimizer, next(batches), padded_length)
        if step % schedule.check_every and step != schedule.steps:
            continue
        kl = divergence(student, validation)
        if kl < best_kl:
            best, best_kl, checks_without_gain = DistillationResult(student.matrices, step, step), kl, 0
        elif (checks_without_gain := checks_without_gain + 1) >= schedule.patience:
            break
    progress(label, schedule.steps, schedule.steps)
    student.load(best.matrices)
    return replace(best, steps_run=step)


def log_probs(model: Any, row: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (tokens - 1, vocabulary) of the next token at every position of a row but the last."""
    import torch

    with torch.inference_mode():
        logits = model(row, use_cache=False).logits[0, :-1]
        normalized: torch.Tensor = logits.float().log_softmax(dim=-1)
    return normalized


def divergence(student: Student, examples: Sequence[DistillationExample]) -> float:
    """Mean coarse KL(teacher || student) in nats per position."""
    import torch

    with torch.inference_mode():
        per_example = [_divergences(student, [example], len(example.token_ids)).cpu() for example in examples]
        positions = torch.cat(per_example)
    return float(positions.double().mean())


def _train_step(student: Student, optimizer: Any, examples: Sequence[DistillationExample], padded_length: int) -> None:
    import torch

    _divergences(student, examples, padded_length).mean().backward()
    torch.nn.utils.clip_grad_norm_(student.parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _batches(
    examples: Sequence[DistillationExample], schedule: TrainingSchedule
) -> Iterator[list[DistillationExample]]:
    """Endless batches. Every example is used once before any is used again."""
    order = random.Random(schedule.seed)  # noqa: S311 - shuffles rows, guards nothing
    queue: list[DistillationExample] = []
    while True:
        while len(queue) < schedule.rows_per_step:
            queue += order.sample(examples, len(examples))
        yield [queue.pop(0) for _ in range(schedule.rows_per_step)]


def _divergences(student: Student, examples: Sequence[DistillationExample], padded_length: int) -> torch.Tensor:
    """Coarse KL at every position of the examples, concatenated.

    The rows are padded to one length, because on a CPU the matrix kernels prepare themselves anew for every shape. A
    position attends only to positions before it, and the padding is at the end, so no attention mask is needed.
    """
    import torch

    causal_lm = student.model.get_base_model()
    device = causal_lm.get_output_embeddings().weight.device
    token_ids = torch.full((len(examples), padded_length), _PADDING_ID)
    is_taught = torch.zeros((len(examples), padded_length), dtype=torch.bool)
    for index, example in enumerate(examples):
        token_ids[index, : len(example.token_ids)] = example.token_ids
        is_taught[index, : len(example.top_ids)] = True
    hidden = causal_lm.get_decoder()(input_ids=token_ids.to(device), use_cache=False).last_hidden_state
    # The output head is a large part of a small model, so it runs only at positions that have a teacher's distribution.
    logits = logits_of(causal_lm, hidden[is_taught.to(device)]).float()
    top_ids = torch.cat([example.top_ids for example in examples]).long().to(device)
    teacher = torch.cat([example.log_probs for example in examples]).to(device)
    normalizer = logits.logsumexp(dim=-1, keepdim=True)
    student_log_probs = (
        torch.cat([logits.gather(1, top_ids), _logsumexp_of_others(logits, top_ids)], dim=1) - normalizer
    )
    return (teacher.exp() * (teacher - student_log_probs)).sum(-1)


def _logsumexp_of_others(logits: torch.Tensor, top_ids: torch.Tensor) -> torch.Tensor:
    """Logarithm of the sum of exp(logits) over all tokens but `top_ids`, (positions, 1).

    It is not computed as log(1 - sum over `top_ids`): where that sum is near 1, the difference is rounding error.
    """
    return logits.scatter(1, top_ids.long(), -float("inf")).logsumexp(dim=-1, keepdim=True)
