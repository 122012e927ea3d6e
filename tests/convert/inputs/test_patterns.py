"""Patterns of ranks and alphas are matched as PEFT matched them in training: PEFT is the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel

from convert.inputs.adapter_checkpoint import Checkpoint
from tests.convert import parts
from tests.convert.asking import Request, convert


def save_headless(base: Path, directory: Path, **settings: Any) -> Path:
    """An adapter that was trained on the decoder alone, as for embeddings: its paths begin with `layers`."""
    torch.manual_seed(11)
    model = AutoModel.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "up_proj"], **settings))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.07)
    adapted.save_pretrained(directory)
    (directory / "README.md").unlink(missing_ok=True)
    parts.edit_json(directory / "adapter_config.json", base_model_name_or_path="acme/tiny-llama")
    return parts.mark_lora(directory)


def logits_of_headless(base: Path, adapter: Path) -> torch.Tensor:
    """What PEFT computes on the decoder alone, with the tied head after it."""
    decoder = AutoModel.from_pretrained(base, dtype=torch.float32)
    head = decoder.get_input_embeddings().weight.detach().clone()
    adapted = PeftModel.from_pretrained(decoder, str(adapter)).eval()
    with torch.inference_mode():
        return adapted(parts.PROMPT).last_hidden_state[0] @ head.T


@pytest.mark.parametrize(
    ("settings", "ignored"),
    [
        ({"alpha_pattern": {"^layers.0.self_attn.q_proj": 64}}, []),
        ({"rank_pattern": {"^layers.1": 4, "^layers.1.mlp.up_proj": 4}}, ["'rank_pattern: ^layers.1'"]),
        (
            {"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 64}},
            ["'alpha_pattern: ^model.layers.0.self_attn.q_proj'"],
        ),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 64}}, []),
    ],
    ids=["alpha", "rank", "of the whole model", "without an anchor"],
)
def test_patterns_of_a_headless_adapter_match_what_peft_matches(
    base: Path, tmp_path: Path, out: Path, settings: dict[str, Any], ignored: list[str]
) -> None:
    adapter = save_headless(base, tmp_path / "made", **settings)

    artifact = convert(Request(adapter, base, out, route="merge", quantize="none", dtype="float16"))

    expected = logits_of_headless(base, adapter)
    assert parts.divergence(expected, parts.logits(parts.load_float32(out / "model"))) < 1e-5
    assert artifact.manifest.quality
    assert artifact.manifest.quality.kl_mean < 1e-4
    unmatched = [
        note.partition(" matches no adapted module")[0] for note in artifact.manifest.notes if "matches" in note
    ]
    assert unmatched == ignored


def test_a_pattern_that_matches_no_module_is_told(base: Path, lora: Path, tmp_path: Path) -> None:
    headless = save_headless(base, tmp_path / "made", alpha_pattern={"^model.layers.0.self_attn.q_proj": 64})
    plain = parts.copy(lora, tmp_path / "plain")
    parts.edit_json(plain / "adapter_config.json", rank_pattern={"q_prj": 4}, alpha_pattern={"q_proj": 16, "^mlp": 3})

    notes = [[note for note in Checkpoint.open(root).warnings if "matches no" in note] for root in (headless, plain)]

    assert notes == [
        [
            "'alpha_pattern: ^model.layers.0.self_attn.q_proj' matches no adapted module, so that training ignored it: "
            "is it a typing error?"
        ],
        [
            "'rank_pattern: q_prj' matches no adapted module, so that training ignored it: is it a typing error?",
            "'alpha_pattern: ^mlp' matches no adapted module, so that training ignored it: is it a typing error?",
        ],
    ]
