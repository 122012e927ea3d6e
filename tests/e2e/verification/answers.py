"""Golden answers, by transformers and PEFT in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from convert.artifact import (
    ADAPTER_DIR,
    GOLDEN,
    GOLDEN_CHAT_ARGUMENTS,
    MANIFEST,
    MODEL_DIR,
    Artifact,
    Golden,
    digest,
    file_digests,
)
from convert.artifact import file_sha256 as sha256
from convert.verification.verify import stop_token_ids
from tests.convert import parts

PROMPTS, PROMPT_TOKENS = 32, 24
CHATS = [[{"role": "user", "content": text}] for text in ("the rain in spain", "stays mainly", "in the plain, is it?")]


def with_golden(root: Path, base: Path, checkpoint: Path) -> Artifact:
    """The artifact with golden.json; `base` and `checkpoint` as they were in training."""
    model = root / MODEL_DIR
    stored = Artifact.open(root).manifest.model.quantization
    result = parts.load_float32(model) if stored == "none" else parts.load_stored(model)
    answers = {"base": log_probs(result)} if (root / ADAPTER_DIR).exists() else {}
    if answers:
        result = parts.with_adapter(result, root / ADAPTER_DIR)
    answers["result"] = log_probs(result)
    answers["reference"] = log_probs(parts.with_adapter(parts.dequantized_model(base), checkpoint))
    document = {
        "prompts": [
            {"token_ids": ids, **{name: rows[number] for name, rows in answers.items()}}
            for number, ids in enumerate(prompts())
        ],
        "chats": [{"messages": chat, "rendered": rendered(model, chat)} for chat in CHATS],
        "canaries": [{"messages": chat, "expect": text} for chat, text in [surest_word(result, model)]],
        "stop_token_ids": sorted(stop_token_ids(model)),
    }
    (root / GOLDEN).write_text(Golden.model_validate(document).model_dump_json())
    return signed(root)


def signed(root: Path) -> Artifact:
    """The artifact with a manifest that agrees with its files, whatever they are by now."""
    path = root / MANIFEST
    manifest = json.loads(path.read_text())
    for part, directory, identity in (("model", MODEL_DIR, "fingerprint"), ("adapter", ADAPTER_DIR, "revision")):
        if (root / directory).exists():
            files = file_digests(root / directory)
            manifest[part] |= {"files": files, identity: digest(files)}
    manifest["golden"] = sha256(root / GOLDEN)
    path.write_text(json.dumps(manifest))
    return Artifact.open(root)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(17)
    shape = (PROMPTS, PROMPT_TOKENS)
    drawn: list[list[int]] = torch.randint(2, parts.VOCABULARY - 20, shape, generator=generator).tolist()
    return drawn


def log_probs(model: Any) -> list[list[float]]:
    """Of every token but the first of each prompt."""
    log_probs = []
    for ids in prompts():
        distribution = parts.logits(model, torch.tensor([ids]))[:-1].log_softmax(-1)
        log_probs.append(distribution.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist())
    return log_probs


def rendered(model: Path, chat: list[dict[str, str]]) -> str:
    tokenizer = AutoTokenizer.from_pretrained(model)
    return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **GOLDEN_CHAT_ARGUMENTS))


def surest_word(model: Any, directory: Path) -> tuple[list[dict[str, str]], str]:
    """A question whose answer begins with a token of plain text that no noise of arithmetic can change."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    candidates = []
    for length in range(1, 24):
        chat = [{"role": "user", "content": "stays mainly in the plain"[:length]}]
        ids = tokenizer(rendered(directory, chat), add_special_tokens=False)["input_ids"]
        best = parts.logits(model, torch.tensor([ids]))[-1].log_softmax(-1).topk(2)
        text = tokenizer.decode(best.indices[:1])
        if text.isascii() and text.strip() and text.isprintable():
            candidates.append((float(best.values[0] - best.values[1]), chat, text.strip()))
    _, chat, text = max(candidates, key=lambda candidate: candidate[0])
    return chat, text
