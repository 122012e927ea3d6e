from __future__ import annotations

from pathlib import Path

import pytest
import torch

from convert.inputs.base_model import BaseModel
from convert.progress import silent
from convert.routes import activations
from tests.convert import parts


def test_modules_with_the_same_input_share_one_recording(base: Path) -> None:
    model = parts.load_float32(base)
    modules = list(BaseModel.open(base).linears)
    rows = [parts.PROMPT, parts.PROMPT.flip(1)[:, :5]]

    recorded = activations.record_activations(model, modules, rows, silent)

    layer = "model.layers.1"
    with torch.inference_mode():
        states = model.model(rows[0], output_hidden_states=True).hidden_states[1]
        expected = model.get_submodule(f"{layer}.input_layernorm")(states)[0]
    q_proj = recorded[f"{layer}.self_attn.q_proj"]
    assert q_proj.shape == (12 + 5, 64)
    torch.testing.assert_close(q_proj[:12].float(), expected, rtol=1e-2, atol=1e-2)
    assert recorded[f"{layer}.self_attn.k_proj"] is q_proj
    assert recorded[f"{layer}.mlp.up_proj"] is recorded[f"{layer}.mlp.gate_proj"]
    assert recorded[f"{layer}.mlp.up_proj"] is not q_proj
    assert recorded.keys() == set(modules)


def test_no_more_tokens_are_recorded_than_the_limit(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "MAX_TOKENS", 20)
    model = parts.load_float32(base)

    recorded = activations.record_activations(model, list(BaseModel.open(base).linears), [parts.PROMPT] * 5, silent)

    assert {len(tensor) for tensor in recorded.values()} == {20}
    assert not any(module._forward_pre_hooks for module in model.modules())
