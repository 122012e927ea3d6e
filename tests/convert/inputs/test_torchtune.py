"""torchtune's own names: translated, with the rows of q and k in the order of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from convert.errors import CheckpointUnsupported
from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel
from convert.plan.weight_updates import WeightUpdates, updated_weight
from tests.convert import parts, trainers
from tests.convert.asking import Request, convert


def interleaved(states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """torchtune's rotation of (tokens, heads, head_dim): neighbours are a pair."""
    pairs = states.unflatten(-1, (-1, 2))
    first, second = pairs[..., 0], pairs[..., 1]
    cosine, sine = cosine[:, None], sine[:, None]
    return torch.stack([first * cosine - second * sine, second * cosine + first * sine], -1).flatten(-2)


def test_torchtunes_attention_equals_that_of_transformers_with_the_translated_weights(
    base: Path, unmarked: Path, tmp_path: Path
) -> None:
    native = trainers.torchtune_native(base, parts.copy(unmarked, tmp_path / "epoch_0"))
    torch.manual_seed(3)
    hidden = torch.randn(1, 9, 64)
    model = parts.load_float32(base)
    attention = model.model.layers[0].self_attn
    cosine, sine = model.model.rotary_emb(hidden, torch.arange(9)[None])

    with_translated_weights = transformers_attention(attention, native, base, hidden, cosine, sine)
    with_torchtune_weights = torchtune_attention(attention, native, hidden[0], cosine[0, :, :8], sine[0, :, :8])

    torch.testing.assert_close(with_translated_weights, with_torchtune_weights, rtol=1e-4, atol=1e-4)


def transformers_attention(
    attention: Any, native: Path, base: Path, hidden: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
) -> torch.Tensor:
    import copy

    checkpoint, opened = Checkpoint.open(native), BaseModel.open(base)
    updates = WeightUpdates.of(checkpoint, opened, separate=False).by_weight
    merged = copy.deepcopy(attention)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        weight = f"model.layers.0.self_attn.{name}.weight"
        getattr(merged, name).weight.data = updated_weight(
            opened.tensors.read(weight).float(), updates[weight], checkpoint
        )
    mask = torch.full((9, 9), float("-inf")).triu(1)[None, None]
    with torch.inference_mode():
        result: torch.Tensor = merged(hidden, position_embeddings=(cosine, sine), attention_mask=mask)[0][0]
    return result


def torchtune_attention(
    attention: Any, native: Path, hidden: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
) -> torch.Tensor:
    """Written from torchtune's own formulas: native weights, native order of rows, scale 2."""
    from safetensors.torch import load_file

    tensors = load_file(native / "adapter_model.safetensors")
    weights = {}
    for hf, name in (("q_proj", "q_proj"), ("k_proj", "k_proj"), ("v_proj", "v_proj"), ("o_proj", "output_proj")):
        weight = getattr(attention, hf).weight.data
        if name in ("q_proj", "k_proj"):
            weight = weight.view(-1, 2, 8, 64).transpose(1, 2).reshape(-1, 64)
        a, b = (tensors[f"layers.0.attn.{name}.lora_{matrix}.weight"] for matrix in "ab")
        weights[name] = weight + 2.0 * (b @ a)
    q, k, v = ((hidden @ weights[name].T).unflatten(-1, (-1, 16)) for name in ("q_proj", "k_proj", "v_proj"))
    q, k = interleaved(q, cosine, sine), interleaved(k, cosine, sine)
    k, v = (each.repeat_interleave(2, dim=1) for each in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / 16**0.5 + torch.full((9, 9), float("-inf")).triu(1)
    mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
    return mixed @ weights["output_proj"].T


def test_torchtunes_own_names_give_the_same_model(base: Path, unmarked: Path, tmp_path: Path, out: Path) -> None:
    native = trainers.torchtune_native(base, parts.copy(unmarked, tmp_path / "native"))
    parts.mark_qlora(native)

    request = Request(
        checkpoint=native, base=base, destination=out, name="tiny", route="merge", quantize="none", dtype="float16"
    )
    quality = convert(request).manifest.quality

    expected = parts.logits(parts.with_adapter(parts.dequantized_model(base), unmarked))
    assert parts.divergence(expected, parts.logits(parts.load_float32(out / "model"))) < 1e-5
    assert quality
    assert quality.kl_mean < 1e-4
    assert Checkpoint.open(native).layout == "torchtune"


def test_torchtunes_own_names_need_the_bases_config(base: Path, unmarked: Path, tmp_path: Path) -> None:
    native = trainers.torchtune_native(base, parts.copy(unmarked, tmp_path / "native"))
    (native / "config.json").unlink()

    with pytest.raises(CheckpointUnsupported, match=r"need config\.json of the base model.*copy it beside the adapter"):
        Checkpoint.open(native).require_supported()


def test_qwen_is_not_reordered_as_torchtune_keeps_its_rows_by_halves(
    base: Path, unmarked: Path, tmp_path: Path
) -> None:
    native = trainers.torchtune_native(base, parts.copy(unmarked, tmp_path / "native"))
    parts.edit_json(native / "config.json", model_type="qwen2")

    assert {weights.head_dim for weights in Checkpoint.open(native).lora_weights.values()} == {None}
