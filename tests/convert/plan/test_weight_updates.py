"""What is trained beside LoRA is merged, or baked into the base of a separate adapter: the oracle is PEFT, unmerged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from convert.artifact import Artifact
from convert.errors import BaseMismatch, CheckpointUnsupported
from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel
from convert.plan.weight_updates import LoadedUpdate, WeightUpdates, updated_weight
from tests.convert import parts
from tests.convert.asking import Request, convert
from tests.convert.trained import KINDS, LINEAR, resized, save_trained

SERVED = {name: settings for name, settings in KINDS.items() if "dora" not in name}


def run(checkpoint: Path, base: Path, out: Path, **settings: Any) -> Artifact:
    request = {"name": "tiny", "measure": False, **settings}
    return convert(Request(checkpoint=checkpoint, base=base, destination=out, **request))


def marked(checkpoint: Path, training: str) -> Path:
    return (parts.mark_qlora if training == "qlora" else parts.mark_lora)(checkpoint)


def as_trained(checkpoint: Path, base: Path, training: str, rows: int | None = None) -> torch.Tensor:
    model = parts.dequantized_model(base) if training == "qlora" else parts.load_float32(base)
    return parts.logits(parts.with_adapter(resized(model, rows), checkpoint))


def without_adapter(base: Path, training: str) -> torch.Tensor:
    return parts.logits(parts.dequantized_model(base) if training == "qlora" else parts.load_float32(base))


@pytest.mark.parametrize("training", ["lora", "qlora"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS.keys())
def test_a_merged_model_holds_everything_that_was_trained(
    base: Path, untied_base: Path, tmp_path: Path, out: Path, settings: dict[str, Any], tied: bool, training: str
) -> None:
    given = base if tied else untied_base
    adapter = marked(save_trained(given, tmp_path / "made", **settings), training)

    run(adapter, given, out, route="merge", quantize="none", dtype="float16")

    expected = as_trained(adapter, given, training)
    written_logits = parts.logits(parts.load_float32(out / "model"))
    assert parts.divergence(expected, written_logits) < 1e-5
    assert parts.divergence(expected, without_adapter(given, training)) > 1e-2


@pytest.mark.parametrize("training", ["lora", "qlora"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("settings", SERVED.values(), ids=SERVED.keys())
def test_for_a_separate_adapter_the_other_changes_are_written_into_the_base(
    base: Path, untied_base: Path, tmp_path: Path, out: Path, settings: dict[str, Any], tied: bool, training: str
) -> None:
    given = base if tied else untied_base
    adapter = marked(save_trained(given, tmp_path / "made", **settings), training)

    artifact = run(adapter, given, out, route="adapter", quantize="auto" if training == "qlora" else "none")

    kept = load_file(out / "adapter" / "adapter_model.safetensors")
    assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in kept)
    expected = as_trained(adapter, given, training)
    written_base = (parts.load_stored if training == "qlora" else parts.load_float32)(out / "model")
    written_logits = parts.logits(parts.with_adapter(written_base, out / "adapter"))
    assert parts.divergence(expected, written_logits) < 1e-4
    baked = not settings.get("target_modules") or "embed_tokens" in settings["target_modules"]
    assert ("belongs to this adapter alone" in artifact.manifest.route.reason) is baked


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_resized_vocabulary_is_taken_over(
    base: Path, untied_base: Path, tmp_path: Path, out: Path, tied: bool
) -> None:
    given = base if tied else untied_base
    adapter = marked(save_trained(given, tmp_path / "made", rows=280), "lora")

    run(adapter, given, out / "merged", route="merge", quantize="none", dtype="float16")
    run(adapter, given, out / "separate", route="adapter", quantize="none")

    expected = as_trained(adapter, given, "lora", rows=280)
    merged = parts.logits(parts.load_float32(out / "merged" / "model"))
    separate = parts.logits(
        parts.with_adapter(parts.load_float32(out / "separate" / "model"), out / "separate" / "adapter")
    )
    config = json.loads((out / "merged" / "model" / "config.json").read_text())
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (280, tied)
    assert merged.shape[-1] == separate.shape[-1] == 280
    assert parts.divergence(expected, merged) < 1e-5
    assert parts.divergence(expected, separate) < 1e-4


def test_the_shared_weight_of_a_resized_vocabulary_may_be_saved_once(base: Path, tmp_path: Path, out: Path) -> None:
    adapter = marked(save_trained(base, tmp_path / "made", rows=280), "lora")
    parts.edit_weights(adapter, lambda tensors: {name: t for name, t in tensors.items() if "lm_head" not in name})

    run(adapter, base, out, route="merge", quantize="none", dtype="float16")

    expected = as_trained(adapter, base, "lora", rows=280)
    assert parts.divergence(expected, parts.logits(parts.load_float32(out / "model"))) < 1e-5
    assert json.loads((out / "model" / "config.json").read_text())["tie_word_embeddings"] is True


def test_tokens_trained_in_a_resized_vocabulary(base: Path, tmp_path: Path, out: Path) -> None:
    adapter = marked(save_trained(base, tmp_path / "made", rows=280, trainable_token_indices=[274, 279]), "lora")

    run(adapter, base, out, route="merge", quantize="none", dtype="float16")

    expected = as_trained(adapter, base, "lora", rows=280)
    assert parts.divergence(expected, parts.logits(parts.load_float32(out / "model"))) < 1e-5


def test_a_head_that_was_resized_and_not_saved_is_refused(base: Path, tmp_path: Path, out: Path) -> None:
    adapter = marked(save_trained(base, tmp_path / "made", rows=280, modules_to_save=["embed_tokens"]), "lora")
    parts.edit_weights(adapter, lambda tensors: {name: t for name, t in tensors.items() if "lm_head" not in name})

    with pytest.raises(BaseMismatch, match=r"only one of embedding \(280 rows\) and head \(272 rows\)"):
        run(adapter, base, out, route="merge", quantize="none")


def test_a_linear_layer_trained_as_a_whole_is_merged_and_never_separate(base: Path, tmp_path: Path, out: Path) -> None:
    adapter = marked(save_trained(base, tmp_path / "made", **LINEAR), "lora")

    run(adapter, base, out, route="merge", quantize="none", dtype="float16")

    expected = as_trained(adapter, base, "lora")
    assert parts.divergence(expected, parts.logits(parts.load_float32(out / "model"))) < 1e-5
    with pytest.raises(CheckpointUnsupported, match="merge it with --route merge"):
        run(adapter, base, tmp_path / "separate", route="adapter", quantize="none")


@pytest.mark.parametrize("kind", [name for name in KINDS if "dora" in name])
def test_dora_does_not_stay_separate(base: Path, tmp_path: Path, kind: str) -> None:
    adapter = marked(save_trained(base, tmp_path / "made", **KINDS[kind]), "lora")

    with pytest.raises(CheckpointUnsupported, match=r"14 modules are DoRA.* --route merge"):
        run(adapter, base, tmp_path / "separate", route="adapter")


def test_every_dora_weight_is_the_correctly_rounded_float64_one(base: Path, tmp_path: Path, out: Path) -> None:
    adapter = marked(save_trained(base, tmp_path / "made", use_dora=True), "lora")
    before, tensors = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")

    run(adapter, base, out, route="merge", quantize="none")

    written = load_file(out / "model" / "model.safetensors")
    equal = 0.0
    linears = [name.removesuffix(".weight") for name in written if "_proj." in name]
    for module in linears:
        a, b, m = (
            tensors[f"base_model.model.{module}.{part}"].double()
            for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
        )
        total = before[f"{module}.weight"].double() + 2.0 * (b @ a)
        expected = (m / total.norm(dim=1))[:, None] * total
        equal += float((expected.to(torch.bfloat16) == written[f"{module}.weight"]).double().mean()) / len(linears)
    assert equal > 0.9999


def test_the_rows_of_a_weight_may_be_updated_in_pieces(base: Path, tmp_path: Path) -> None:
    adapter = save_trained(base, tmp_path / "made", **KINDS["dora, rows, norms"])
    checkpoint, opened = Checkpoint.open(adapter), BaseModel.open(base)
    updates = WeightUpdates.of(checkpoint, opened, separate=False)

    for name, update in updates.by_weight.items():
        weight = opened.tensors.read(name).float()
        loaded = LoadedUpdate.of(update, checkpoint)
        if update.saved is None:
            pieces = [loaded.apply(piece.clone(), 16 * at) for at, piece in enumerate(weight.split(16))]
            expected = updated_weight(weight.clone(), update, checkpoint)
            torch.testing.assert_close(torch.cat(pieces), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_embeddings_that_peft_saved_and_nobody_trained_leave_the_base_shared(
    base: Path, tmp_path: Path, out: Path, dtype: torch.dtype
) -> None:
    first = run(marked(parts.save_adapter(base, tmp_path / "first"), "qlora"), base, tmp_path / "artifact")
    adapter = marked(save_trained(base, tmp_path / "made", **KINDS["head delta"]), "qlora")
    assert "base_model.model.lm_head.base_layer.weight" in load_file(adapter / "adapter_model.safetensors")
    parts.edit_weights(adapter, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})

    artifact = run(adapter, first.root, out)

    assert artifact.manifest.model.path is None
    assert artifact.manifest.model.fingerprint == first.manifest.model.fingerprint


def test_a_changed_base_is_not_the_shared_one(base: Path, tmp_path: Path, out: Path) -> None:
    first = run(marked(parts.save_adapter(base, tmp_path / "first"), "qlora"), base, tmp_path / "artifact")
    adapter = marked(save_trained(base, tmp_path / "made", **KINDS["tokens"]), "qlora")

    artifact = run(adapter, first.root, out)

    assert artifact.manifest.model.path == "model"
    assert artifact.manifest.model.fingerprint != first.manifest.model.fingerprint
    assert "What was trained beside LoRA (model.embed_tokens.weight)" in artifact.manifest.route.reason
    before, after = (load_file(root / "model" / "model.safetensors") for root in (first.root, out))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["model.embed_tokens.weight"]


def test_tied_embeddings_stay_tied_where_both_were_trained_alike(base: Path, tmp_path: Path, out: Path) -> None:
    for kind in ("tokens", "embedding and head, kept tied", "deltas kept tied", "norms"):
        adapter = marked(save_trained(base, tmp_path / kind, **KINDS[kind]), "lora")
        run(adapter, base, out / kind, route="merge", quantize="none")

        assert "lm_head.weight" not in load_file(out / kind / "model" / "model.safetensors")
        assert json.loads((out / kind / "model" / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_tied_head_is_untied_where_it_was_trained_alone(base: Path, tmp_path: Path, out: Path) -> None:
    adapter = marked(save_trained(base, tmp_path / "made", **KINDS["head"]), "lora")

    manifest = run(adapter, base, out, route="merge", quantize="none").manifest

    written = load_file(out / "model" / "model.safetensors")
    assert json.loads((out / "model" / "config.json").read_text())["tie_word_embeddings"] is False
    assert any("lm_head.weight is written, and tie_word_embeddings is false" in note for note in manifest.notes)
    assert torch.equal(
        written["model.embed_tokens.weight"], load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    )
    saved = load_file(adapter / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    assert torch.equal(written["lm_head.weight"], saved.to(torch.bfloat16))


def test_a_second_copy_of_a_tied_head_in_the_base_is_not_mistaken_for_a_head(
    base: Path, tmp_path: Path, out: Path
) -> None:
    doubled = parts.copy(base, tmp_path / "doubled")
    from safetensors.torch import save_file

    tensors = load_file(doubled / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, doubled / "model.safetensors", metadata={"format": "pt"})
    adapter = marked(save_trained(base, tmp_path / "made", **KINDS["tokens"]), "lora")

    run(adapter, doubled, out, route="merge", quantize="none")

    assert "lm_head.weight" not in load_file(out / "model" / "model.safetensors")


def test_the_measurement_knows_everything_that_was_trained(base: Path, tmp_path: Path, out: Path) -> None:
    for kind in ("dora, rows, norms", "embedding and head", "embedding delta", "tokens of both"):
        adapter = marked(save_trained(base, tmp_path / kind, **KINDS[kind]), "qlora")

        quality = run(adapter, base, out / kind, route="merge", quantize="none", measure=True).manifest.quality

        assert quality
        assert quality.kl_mean < 2e-4


def test_the_measurement_resizes_the_vocabulary(base: Path, tmp_path: Path, out: Path) -> None:
    adapter = marked(save_trained(base, tmp_path / "made", rows=280), "lora")

    quality = run(adapter, base, out, route="merge", quantize="none", measure=True).manifest.quality

    assert quality
    assert quality.kl_mean < 2e-4


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"modules_to_save": ["embed_tokens"]}, "model.embed_tokens.weight was saved in the shape"),
        ({"modules_to_save": ["norm"]}, "model.norm.weight was trained as a whole in the shape"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "model.embed_tokens: the adapter is for"),
        ({"trainable_token_indices": [1, 5]}, "the trained rows have 64 columns, the base has 96"),
    ],
    ids=["embedding", "norm", "delta", "tokens"],
)
def test_updates_of_another_shape_are_refused(
    base: Path, tmp_path: Path, out: Path, settings: dict[str, Any], says: str
) -> None:
    wider = parts.save_base(tmp_path / "wider", tied=True, hidden=96)
    adapter = marked(save_trained(base, tmp_path / "made", **settings), "lora")

    with pytest.raises(BaseMismatch) as caught:
        run(adapter, wider, out, route="merge", quantize="none")

    assert says in str(caught.value)


def test_rows_beyond_the_vocabulary_are_refused(base: Path, tmp_path: Path, out: Path) -> None:
    adapter = marked(save_trained(base, tmp_path / "made", trainable_token_indices=[1, 5]), "lora")
    parts.edit_json(adapter / "adapter_config.json", trainable_token_indices=[1, 500])

    with pytest.raises(BaseMismatch, match="rows up to 500 were trained, the base has 272"):
        run(adapter, base, out, route="merge", quantize="none")
