"""The separate adapter: the same function as trained, on a 4-bit base that transformers would have quantized itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from convert.artifact import Artifact
from convert.errors import BaseMismatch
from tests.convert import parts
from tests.convert.asking import Request, convert


def separate(checkpoint: Path, base: Path, out: Path, **settings: Any) -> Artifact:
    request = {"name": "tiny", "measure": False, **settings}
    return convert(Request(checkpoint=checkpoint, base=base, destination=out, **request))


def test_a_qlora_stays_separate_on_its_4_bit_base_by_default(qlora: Path, base: Path, out: Path) -> None:
    manifest = separate(qlora, base, out).manifest

    assert (manifest.route.name, manifest.route.merged_onto, manifest.model.quantization) == (
        "adapter",
        None,
        "nf4-double",
    )
    assert (manifest.quality, manifest.origin.training) == (None, "qlora")
    assert parts.tree(out) == {
        "manifest.json",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "model/config.json",
        "model/generation_config.json",
        "model/model.safetensors",
        "model/tokenizer.json",
        "model/tokenizer_config.json",
        "model/chat_template.jinja",
    }


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_written_base_is_what_transformers_quantizes_itself(
    base: Path, untied_base: Path, tmp_path: Path, out: Path, tied: bool, double: bool
) -> None:
    given = base if tied else untied_base
    adapter = parts.mark_qlora(parts.save_adapter(given, tmp_path / "adapter"), double=double)

    separate(adapter, given, out)

    from transformers import AutoModelForCausalLM

    written = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.bfloat16).eval()
    assert torch.equal(parts.logits(written), parts.logits(parts.load_quantized(given, double=double)))
    oracle = load_file(parts.save_quantized(given, tmp_path / "oracle", double=double) / "model.safetensors")
    ours = load_file(out / "model" / "model.safetensors")
    assert ours.keys() == oracle.keys()
    for name, tensor in oracle.items():
        if name.endswith("bitsandbytes__nf4"):  # filled up with spaces
            assert json.loads(bytes(ours[name].tolist())) == json.loads(bytes(tensor.tolist()))
        else:
            assert torch.equal(ours[name], tensor), name
    config = json.loads((tmp_path / "oracle/config.json").read_text())
    # transformers reads either name, older readers only the second.
    assert json.loads((out / "model/config.json").read_text()) == config | {"torch_dtype": config["dtype"]}


def test_the_artifact_answers_as_trained(qlora: Path, base: Path, out: Path) -> None:
    separate(qlora, base, out)

    expected = parts.logits(parts.with_adapter(parts.load_quantized(base), qlora))
    actual = parts.logits(parts.with_adapter(parts.load_quantized(base), out / "adapter"))
    assert torch.equal(expected, actual)


VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rslora with a whole root": {"use_rslora": True, "r": 16},
    "rank pattern": {"rank_pattern": {"q_proj": 4, "layers.1.mlp.up_proj": 12}},
    "alpha pattern": {"alpha_pattern": {"down_proj": 5}},
    "everything": {"use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"down_proj": 5}},
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
def test_the_normalised_adapter_has_one_rank_and_one_scale_and_the_same_logits(
    base: Path, tmp_path: Path, out: Path, settings: dict[str, Any]
) -> None:
    adapter = parts.mark_lora(parts.save_adapter(base, tmp_path / "adapter", **settings))

    artifact = separate(adapter, base, out, route="adapter", quantize="none")

    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    ranks = {
        tensor.shape[0] for name, tensor in load_file(out / "adapter/adapter_model.safetensors").items() if "A" in name
    }
    assert ranks == {config["r"]}
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)
    is_noted = any(f"padded with zeros to rank {config['r']}" in note for note in artifact.manifest.notes)
    assert is_noted is (settings not in (VARIANTS["plain"], VARIANTS["rslora with a whole root"]))
    assert artifact.manifest.adapter
    assert artifact.manifest.adapter.rank == config["r"]
    expected = parts.logits(parts.with_adapter(parts.load_float32(base), adapter))
    actual = parts.logits(parts.with_adapter(parts.load_float32(base), out / "adapter"))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_weights_stay_as_they_are_where_the_scale_can_be_said_in_the_configuration(
    base: Path, tmp_path: Path, out: Path
) -> None:
    adapter = parts.mark_lora(parts.save_adapter(base, tmp_path / "adapter", use_rslora=True, r=16))

    separate(adapter, base, out, route="adapter", quantize="none")

    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, out / "adapter"))
    assert all(torch.equal(after[name], before[name]) for name in before)
    config = json.loads((out / "adapter/adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == 16 / math.sqrt(16)


def test_keys_of_other_layouts_are_written_as_peft_names_them(
    qlora: Path, base: Path, tmp_path: Path, out: Path
) -> None:
    copied = parts.copy(qlora, tmp_path / "copy")
    parts.edit_weights(
        copied, lambda ts: {"module." + n.replace(".weight", ".default.weight"): t for n, t in ts.items()}
    )

    separate(copied, base, out)

    expected = load_file(qlora / "adapter_model.safetensors")
    assert load_file(out / "adapter" / "adapter_model.safetensors").keys() == expected.keys()


def test_an_artifact_as_base_is_shared_not_copied(qlora: Path, base: Path, tmp_path: Path, out: Path) -> None:
    first = separate(qlora, base, tmp_path / "first")
    second = separate(parts.mark_qlora(parts.save_adapter(base, tmp_path / "other", r=4)), first.root, out)

    assert parts.tree(out) == {"manifest.json", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert second.manifest.model.path is None
    assert second.manifest.model.fingerprint == first.manifest.model.fingerprint
    assert second.manifest.model.files == first.manifest.model.files
    second.verify()


def test_the_reason_says_that_a_shared_base_serves_its_own_template(
    qlora: Path, base: Path, tmp_path: Path, out: Path
) -> None:
    first = separate(qlora, base, tmp_path / "first")
    copied = parts.copy(qlora, tmp_path / "copy")
    (copied / "chat_template.jinja").write_text("{{ messages }} of its own")

    artifact = separate(copied, first.root, out)

    assert "Served with the base's chat_template.jinja" in artifact.manifest.route.reason


def test_an_nf4_base_is_not_quantized_again(qlora: Path, nf4_base: Path, out: Path) -> None:
    separate(qlora, nf4_base, out)

    before, after = load_file(nf4_base / "model.safetensors"), load_file(out / "model" / "model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_an_nf4_base_of_other_settings_than_in_training_is_refused(
    qlora: Path, base: Path, tmp_path: Path, out: Path
) -> None:
    single = parts.save_quantized(base, tmp_path / "single", double=False)

    with pytest.raises(BaseMismatch, match="without double quantization"):
        separate(qlora, single, out)


def test_a_merged_artifact_is_not_a_base(lora: Path, qlora: Path, base: Path, tmp_path: Path, out: Path) -> None:
    merged = separate(lora, base, tmp_path / "merged", route="merge")

    with pytest.raises(BaseMismatch, match="another fine-tune is already in its weights"):
        separate(qlora, merged.root, out)


def test_a_lora_on_an_nf4_base_alone_says_that_its_loss_was_not_measured(lora: Path, nf4_base: Path, out: Path) -> None:
    artifact = separate(lora, nf4_base, out, route="adapter", measure=True)

    assert artifact.manifest.quality is None
    assert "not measured" in artifact.manifest.route.reason


def test_no_local_path_leaks_into_the_artifact(qlora: Path, base: Path, tmp_path: Path, out: Path) -> None:
    copied = parts.copy(qlora, tmp_path / "copy")
    parts.edit_json(copied / "adapter_config.json", base_model_name_or_path=str(base))
    given = parts.copy(base, tmp_path / "given")
    parts.edit_json(given / "config.json", _name_or_path=str(base))

    artifact = separate(copied, given, out)

    assert artifact.manifest.model.source == base.name
    for name in parts.tree(out):
        assert str(tmp_path).encode() not in (out / name).read_bytes(), name
        assert str(base.parent).encode() not in (out / name).read_bytes(), name


def test_the_checkpoints_tokenizer_and_template_win_over_the_bases(
    qlora: Path, base: Path, tmp_path: Path, out: Path
) -> None:
    copied = parts.copy(qlora, tmp_path / "copy")
    parts.save_tokenizer(copied)
    (copied / "chat_template.jinja").write_text("{{ messages }} as trained")

    separate(copied, base, out)

    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / "model" / name).read_bytes() == (copied / name).read_bytes()
    assert (out / "model/generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
