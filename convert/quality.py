"""What a result lost: its next-token distributions against those of the function as trained, on held-out text.

Reference: the weights the adapter was trained against with the adapter beside them, computed by PEFT in float32.
Result: the files that were written, read back. The reference's log-probabilities are kept and its model is freed
before the result is loaded, so there is one model in memory at a time.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.artifact import Quality
from convert.as_trained import with_adapter
from convert.base_model import BaseModel
from convert.checkpoint import Checkpoint
from convert.errors import BaseUnreadable, QualityGateFailed, TextUnreadable
from convert.formats import HEAD
from convert.nf4 import Nf4
from convert.progress import Progress

if TYPE_CHECKING:
    import torch

DEFAULT_TEXT = Path(__file__).with_name("held_out.jsonl")

# The reference's log-probabilities are kept: 1024 positions of a vocabulary of 128k are half a gigabyte.
_MAX_TOKENS = 1024
_MAX_ROW_TOKENS = 256

Row = str | list[dict[str, str]]


@dataclass(frozen=True)
class Text:
    """Held-out rows: plain text, or chats."""

    name: str
    rows: tuple[Row, ...]

    @classmethod
    def open(cls, path: Path | None) -> Text:
        """Read a JSON lines file of {"text": …} and {"messages": […]}; None: the default. Raises TextUnreadable."""
        try:
            lines = (path or DEFAULT_TEXT).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as cause:
            raise TextUnreadable(f"{path} can't be read as UTF-8 text: {cause}") from None
        rows = tuple(_row(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip())
        if not rows:
            raise TextUnreadable(f'{path} has no rows; expected lines like {{"text": "…"}}')
        return cls(path.name if path else "default", rows)


@dataclass(frozen=True)
class Reference:
    """What the function as trained says: log-probabilities (tokens, vocabulary) for each row of token ids."""

    description: str
    text: str
    rows: tuple[torch.Tensor, ...]
    log_probs: tuple[torch.Tensor, ...]


def require_below(quality: Quality, max_kl: float | None) -> None:
    """Raises QualityGateFailed when the measured loss is above the limit."""
    if max_kl is not None and quality.kl_mean > max_kl:
        raise QualityGateFailed(
            f"The result differs from the model as trained by {quality.kl_mean:.6f} nats per token on average, "
            f"above --max-kl {max_kl} (same best token at {quality.top1_agreement:.1%} of {quality.tokens} positions). "
            "Nothing was published. Take a route that loses less (inspect lists them), or allow more."
        )


def reference(
    checkpoint: Checkpoint, base: BaseModel, quantizer: Nf4 | None, tokenizer: Path, text: Text, progress: Progress
) -> Reference:
    """Run the function as trained over the text. `quantizer`: of training, None for LoRA."""
    rows = _tokenize(text, tokenizer)
    model = _load(base, quantizer)
    model = with_adapter(model, checkpoint)
    log_probs = tuple(_all_log_probs(model, rows, "reference", progress))
    del model
    gc.collect()
    weights = "original" if quantizer is None else "dequantized NF4"
    return Reference(f"{weights} weights with the separate adapter, float32", text.name, rows, log_probs)


def measure(expected: Reference, model: Path, adapter: Path | None, progress: Progress) -> Quality:
    """Compare the written model, with its written adapter if it has one."""
    result = _load(BaseModel.open(model), None)
    if adapter:
        from peft import PeftModel

        result = PeftModel.from_pretrained(result, str(adapter))
    found = _all_log_probs(result, expected.rows, "result", progress)
    return _compare(expected, found)


def _row(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
        if isinstance(row["text"] if "text" in row else row["messages"], str):
            return str(row["text"])
        messages = [{"role": str(one["role"]), "content": str(one["content"])} for one in row["messages"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        messages = []
    if not messages:
        raise TextUnreadable(
            f'{where}: expected {{"text": "…"}} or {{"messages": [{{"role": "user", "content": "…"}}, …]}}'
        )
    return messages


def _tokenize(text: Text, directory: Path) -> tuple[torch.Tensor, ...]:
    """Token ids (1, tokens) of every row that has at least two, until there are enough."""
    import torch
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    except Exception as cause:  # the tokenizers library raises nothing narrower
        raise BaseUnreadable(
            f"The tokenizer can't be loaded ({cause}). Copy the base's tokenizer files again."
        ) from cause
    rows, total = [], 0
    for row in text.rows:
        ids = _token_ids(row, tokenizer)[: min(_MAX_ROW_TOKENS, _MAX_TOKENS - total)]
        if len(ids) > 1:
            rows.append(torch.tensor([ids]))
            total += len(ids)
    if not rows:
        raise TextUnreadable(f"{text.name}: no row has two tokens or more, so there is nothing to compare")
    return tuple(rows)


def _token_ids(row: Row, tokenizer: Any) -> list[int]:
    from jinja2 import TemplateError

    if not isinstance(row, str) and not tokenizer.chat_template:
        row = "\n".join(f"{message['role']}: {message['content']}" for message in row)
    if isinstance(row, str):
        return list(tokenizer(row)["input_ids"])
    try:
        rendered = tokenizer.apply_chat_template(row, tokenize=False)
    except TemplateError as cause:
        roles = ", ".join(message["role"] for message in row)
        raise TextUnreadable(f"The model's chat template refuses a chat of {roles}: {cause}") from cause
    # The template writes the special tokens itself.
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def _load(base: BaseModel, quantizer: Nf4 | None) -> Any:
    """The model in float32, filled weight by weight."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    try:
        config = AutoConfig.for_model(**_plain(base.config))
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    except (ValueError, KeyError, TypeError) as cause:
        raise BaseUnreadable(f"{base.root}: transformers makes no model of its config.json: {cause}") from cause
    model.tie_weights()
    expected = model.state_dict()
    with torch.no_grad():
        filled = {name for name, weight in _weights(base, quantizer) if _fill(expected, name, weight)}
    tied = {f"{HEAD}.weight"} if base.is_tied else set()
    if missing := expected.keys() - filled - tied:
        raise BaseUnreadable(f"{base.root} lacks what its config needs: {', '.join(sorted(missing)[:3])}")
    return model.eval()


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in ("quantization_config", "auto_map")}


def _weights(base: BaseModel, quantizer: Nf4 | None) -> Iterator[tuple[str, torch.Tensor]]:
    for spec in base.others:
        yield spec.name, base.tensors.read(spec.name)
    for linear in base.linears.values():
        if linear.is_head and base.is_tied:
            continue  # some files store it a second time; the embedding is what counts
        yield linear.weight, base.read_as_trained(linear, quantizer)


def _fill(expected: Mapping[str, torch.Tensor], name: str, weight: torch.Tensor) -> bool:
    """False for what the model doesn't hold as a weight, such as an old inv_freq buffer."""
    if name not in expected:
        return False
    if expected[name].shape != weight.shape:
        raise BaseUnreadable(f"{name} is {list(weight.shape)}, its config says {list(expected[name].shape)}")
    expected[name].copy_(weight)
    return True


def _all_log_probs(model: Any, rows: Sequence[torch.Tensor], what: str, progress: Progress) -> Iterator[torch.Tensor]:
    for done, row in enumerate(rows):
        progress(f"measuring {what}", done, len(rows))
        yield _log_probs(model, row)
    progress(f"measuring {what}", len(rows), len(rows))


def _log_probs(model: Any, row: torch.Tensor) -> torch.Tensor:
    """Of the next token after every position but the last: (tokens - 1, vocabulary)."""
    import torch

    with torch.inference_mode():
        logits = model(row, use_cache=False).logits[0, :-1]
        result: torch.Tensor = torch.log_softmax(logits, dim=-1)
    return result


def _compare(expected: Reference, found: Iterator[torch.Tensor]) -> Quality:
    import torch

    divergences, agreements = [], []
    for want, got in zip(expected.log_probs, found, strict=True):
        # In float64: sums over a whole vocabulary of differences near float32's resolution.
        want64, got64 = want.double(), got.double()
        divergences.append((want64.exp() * (want64 - got64)).sum(-1).clamp_min(0))
        agreements.append(want.argmax(-1) == got.argmax(-1))
    divergence = torch.cat(divergences)
    kl_mean, kl_p99 = float(divergence.mean()), float(divergence.quantile(0.99))
    if not math.isfinite(kl_mean):
        raise QualityGateFailed("The result's probabilities are not numbers: nothing was published.")
    return Quality(
        reference=expected.description,
        text=expected.text,
        tokens=divergence.numel(),
        kl_mean=kl_mean,
        kl_p99=kl_p99,
        top1_agreement=float(torch.cat(agreements).double().mean()),
    )
