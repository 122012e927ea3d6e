"""Distillation of one function into the LoRA weights of another: what the teacher says is kept, its model isn't.

The loss is the mean over positions of KL(teacher || student) of the next token. For training the teacher's
distribution is kept coarse: its most probable tokens, and all others as one. Merging outcomes never enlarges a
divergence, so the coarse KL is a lower bound of the full one, within 1e-2 of it in practice, at 1/200 of the memory.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from convert.progress import Progress

if TYPE_CHECKING:
    import torch

_KEPT_TOKENS = 256
_FILLER = 0

Halves = dict[str, tuple["torch.Tensor", "torch.Tensor"]]
"""Module -> A and B of a delta of scale 1, float32."""


@dataclass(frozen=True)
class Lesson:
    """A row of token ids (tokens) with the teacher's coarse distribution after every position but the last.

    `likely`: ids (tokens - 1, kept) of its most probable tokens. `log_probs` (tokens - 1, kept + 1): of those, and of
    all others together.
    """

    row: torch.Tensor
    likely: torch.Tensor
    log_probs: torch.Tensor

    @classmethod
    def of(cls, row: torch.Tensor, log_probs: torch.Tensor) -> Lesson:
        """From full log-probabilities (tokens - 1, vocabulary)."""
        import torch

        kept = log_probs.topk(min(_KEPT_TOKENS, log_probs.shape[1] - 1), dim=-1)
        rest = _rest(log_probs, kept.indices)
        return cls(row.reshape(-1).cpu(), kept.indices.int().cpu(), torch.cat([kept.values, rest], dim=-1).cpu())


@dataclass(frozen=True)
class Course:
    """How long and how fast: AdamW on batches of whole rows, a warm-up of a tenth, then a cosine to a tenth."""

    steps: int
    rows_per_step: int = 4
    learning_rate: float = 5e-4
    check_every: int = 5
    patience: int = 4
    seed: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        warmup = max(1, self.steps // 10)
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * min(1.0, (step + 1) / warmup) * (0.1 + 0.9 * cosine)


@dataclass(frozen=True)
class Distilled:
    """The best halves by the watched rows, and after how many steps they were that. 0: the start was best."""

    halves: Halves
    steps: int
    steps_done: int


def lora_model(model: Any, modules: Sequence[str], rank: int) -> Any:
    """`model` with trainable float32 pairs of scale 1 beside `modules`; everything else is frozen."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(modules), task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def set_halves(model: Any, halves: Halves) -> None:
    """Put pairs into a `lora_model`."""
    import torch

    with torch.no_grad():
        for module, (a, b) in halves.items():
            ours_a, ours_b = _pair(model, module)
            ours_a.copy_(a)
            ours_b.copy_(b)


def get_halves(model: Any, modules: Sequence[str]) -> Halves:
    """Copies of the pairs of a `lora_model`, on the CPU."""
    return {
        module: (a.detach().cpu().clone(), b.detach().cpu().clone())
        for module in modules
        for a, b in [_pair(model, module)]
    }


def distill(
    model: Any,
    modules: Sequence[str],
    lessons: Sequence[Lesson],
    watched: Sequence[Lesson],
    course: Course,
    progress: Progress,
) -> Distilled:
    """Train the pairs of a `lora_model` on `lessons`; stop when the KL of `watched` no longer falls.

    Deterministic on one machine for one seed. The model is left with the best pairs.
    """
    import torch

    trained = [half for module in modules for half in _pair(model, module)]
    optimizer = torch.optim.AdamW(trained, lr=course.learning_rate, weight_decay=0.0)
    best, best_step, worse, done = get_halves(model, modules), 0, 0, 0
    start = best_kl = divergence(model, watched)
    doing = f"distilling, from a KL of {start:.2g}"
    batches, longest = _batches(lessons, course), max(len(lesson.row) for lesson in lessons)
    for done in range(1, course.steps + 1):
        progress(doing, done - 1, course.steps)
        for group in optimizer.param_groups:
            group["lr"] = course.rate(done - 1)
        _divergences(model, next(batches), longest).mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if done % course.check_every and done != course.steps:
            continue
        kl = divergence(model, watched)
        if kl < best_kl:
            best, best_kl, best_step, worse = get_halves(model, modules), kl, done, 0
        elif (worse := worse + 1) >= course.patience:
            break
    progress(doing, course.steps, course.steps)
    set_halves(model, best)
    return Distilled(best, best_step, done)


def log_probs(model: Any, row: torch.Tensor) -> torch.Tensor:
    """Of the next token after every position of a row (1, tokens) but the last: (tokens - 1, vocabulary)."""
    import torch

    with torch.inference_mode():
        logits = model(row, use_cache=False).logits[0, :-1]
        found: torch.Tensor = logits.float().log_softmax(dim=-1)
    return found


def divergence(model: Any, lessons: Sequence[Lesson]) -> float:
    """Mean coarse KL in nats a position."""
    import torch

    with torch.inference_mode():
        found = torch.cat([_divergences(model, [lesson], len(lesson.row)).cpu() for lesson in lessons])
    return float(found.double().mean())


def _batches(lessons: Sequence[Lesson], course: Course) -> Iterator[list[Lesson]]:
    """Endless; every row is seen once before any is seen again."""
    order = random.Random(course.seed)  # noqa: S311 - shuffles rows, guards nothing
    queue: list[Lesson] = []
    while True:
        while len(queue) < course.rows_per_step:
            queue += order.sample(lessons, len(lessons))
        yield [queue.pop(0) for _ in range(course.rows_per_step)]


def _divergences(model: Any, lessons: Sequence[Lesson], length: int) -> torch.Tensor:
    """Coarse KL at every position of the rows, end to end. Rows are filled up to one length: on a CPU every new
    shape costs the matrix kernels a preparation. Nothing attends to what stands behind it, so no mask is needed."""
    import torch

    causal_lm = model.get_base_model()
    device = causal_lm.lm_head.weight.device
    tokens = torch.full((len(lessons), length), _FILLER)
    wanted = torch.zeros((len(lessons), length), dtype=torch.bool)
    for index, lesson in enumerate(lessons):
        tokens[index, : len(lesson.row)] = lesson.row
        wanted[index, : len(lesson.likely)] = True
    hidden = causal_lm.model(input_ids=tokens.to(device), use_cache=False).last_hidden_state
    # The output layer is a good part of a small model: it runs where the teacher has spoken.
    logits = causal_lm.lm_head(hidden[wanted.to(device)]).float()
    likely = torch.cat([lesson.likely for lesson in lessons]).long().to(device)
    teacher = torch.cat([lesson.log_probs for lesson in lessons]).to(device)
    total = logits.logsumexp(dim=-1, keepdim=True)
    student = torch.cat([logits.gather(1, likely), _rest(logits, likely)], dim=1) - total
    return (teacher.exp() * (teacher - student)).sum(-1)


def _rest(logits: torch.Tensor, likely: torch.Tensor) -> torch.Tensor:
    """Logarithm of the sum over all tokens but the likely ones, (rows, 1): not as 1 - the sum of those, which is
    nothing but rounding where they are nearly all."""
    return logits.scatter(1, likely.long(), -float("inf")).logsumexp(dim=-1, keepdim=True)


def _pair(model: Any, module: str) -> tuple[Any, Any]:
    layer = model.get_base_model().get_submodule(module)
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight
