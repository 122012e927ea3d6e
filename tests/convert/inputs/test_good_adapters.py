"""Many good adapters: none is refused, and each keeps its function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.convert import parts, trainers
from tests.convert.inputs.corpus import GOOD, finished
from tests.convert.trained import LINEAR, save_trained


def merged_by_peft(checkpoint: Path, base: Path) -> torch.Tensor:
    return parts.logits(parts.with_adapter(parts.load_float32(base), checkpoint).merge_and_unload().eval())


@pytest.mark.parametrize("settings", GOOD.values(), ids=GOOD.keys())
def test_a_good_adapter_is_merged_as_peft_merges_it(
    base: Path, untied_base: Path, tmp_path: Path, out: Path, settings: dict[str, Any]
) -> None:
    # PEFT merges a delta of a tied embedding into the head as well (test_edits compares those with what is unmerged).
    given = untied_base if {"embed_tokens", "lm_head"} & set(settings.get("target_modules", [])) else base
    adapter = parts.mark_lora(save_trained(given, tmp_path / "made", **settings))

    finished(adapter, given, out)

    written_logits = parts.logits(parts.load_float32(out / "model"))
    assert parts.divergence(merged_by_peft(adapter, given), written_logits) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trainer", trainers.TRAINERS)
def test_a_good_adapter_of_every_trainer_and_type_is_merged(
    base: Path, unmarked: Path, tmp_path: Path, out: Path, trainer: str, dtype: torch.dtype
) -> None:
    _, mark, name, _ = trainers.TRAINERS[trainer]
    adapter = parts.copy(unmarked, tmp_path / "run" / name)
    parts.edit_weights(adapter, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    plain = parts.copy(adapter, tmp_path / "plain")
    from convert.detection.training import Training

    finished(mark(adapter, "lora"), base, out, trained_on=Training.LORA)

    assert parts.divergence(merged_by_peft(plain, base), parts.logits(parts.load_float32(out / "model"))) < 1e-5


@pytest.mark.parametrize(
    "settings", [value for name, value in GOOD.items() if "dora" not in name and value is not LINEAR]
)
def test_vllms_own_loader_takes_every_good_adapter(
    base: Path, tmp_path: Path, out: Path, settings: dict[str, Any]
) -> None:
    peft_helper, lora_model = pytest.importorskip("vllm.lora.peft_helper"), pytest.importorskip("vllm.lora.lora_model")
    from vllm.config.lora import LoRAConfig

    adapter = parts.mark_lora(save_trained(base, tmp_path / "made", **settings))
    finished(adapter, base, out, route="adapter", dtype="auto")

    helper = peft_helper.PEFTHelper.from_local_dir(str(out / "adapter"), max_position_embeddings=None)
    helper.validate_legal(LoRAConfig(max_lora_rank=128))
    loaded = lora_model.LoRAModel.from_local_checkpoint(
        str(out / "adapter"), {*parts.LINEARS, "lm_head"}, helper, device="cpu", model_vocab_size=parts.VOCABULARY
    )
    assert all(lora.lora_a is not None and lora.lora_b is not None for lora in loaded.loras.values())
    assert {lora.scaling for lora in loaded.loras.values()} == {helper.lora_alpha / helper.r}
