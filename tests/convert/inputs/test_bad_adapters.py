"""Many bad adapters: each is refused before an engine sees it, with what to do."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.errors import BaseMismatch, CheckpointUnreadable, CheckpointUnsupported, ConvertError
from tests.convert import parts, trainers
from tests.convert.inputs.corpus import GOOD, finished

MODULE = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{MODULE}.lora_{{}}.weight"


@dataclass(frozen=True)
class Bad:
    """How a good adapter is spoilt, the error, and the words that say what to do."""

    spoil: Callable[[Path], None]
    error: type[ConvertError]
    fix: str


def settings(**changes: Any) -> Callable[[Path], None]:
    return lambda root: parts.edit_json(root / "adapter_config.json", **changes)


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    return lambda root: parts.edit_weights(root, change)


def added(key: str, *shape: int) -> Callable[[Path], None]:
    return weights(lambda tensors: {**tensors, key: torch.ones(*shape)})


def renamed(old: str, new: str) -> Callable[[Path], None]:
    return weights(lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()})


def without(part: str) -> Callable[[Path], None]:
    return weights(lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name})


def replaced(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return weights(lambda tensors: {**tensors, key: change(tensors[key])})


def file(name: str, content: str | bytes | None) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        if content is None:
            (root / name).unlink()
        else:
            (root / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def pickled(root: Path) -> None:
    (root / "adapter_model.safetensors").rename(root / "adapter_model.bin")


def truncated(root: Path) -> None:
    path = root / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def escaping(root: Path) -> None:
    (root / "adapter_model.safetensors").rename(root.parent / "elsewhere.safetensors")
    index = {"weight_map": {"x": "../elsewhere.safetensors"}}
    (root / "adapter_model.safetensors.index.json").write_text(json.dumps(index))


def rank_700(root: Path) -> None:
    parts.edit_json(root / "adapter_config.json", r=700, lora_alpha=700)
    parts.edit_weights(
        root,
        lambda ts: {n: torch.randn((700, t.shape[1]) if "_A." in n else (t.shape[0], 700)) for n, t in ts.items()},
    )


A, B = KEY.format("A"), KEY.format("B")
BAD: dict[str, Bad] = {
    # settings
    "DoRA without magnitudes": Bad(settings(use_dora=True), CheckpointUnsupported, "save the adapter again"),
    "magnitudes without DoRA": Bad(
        added(f"base_model.model.{MODULE}.lora_magnitude_vector", 64), CheckpointUnsupported, "set it to true if"
    ),
    "lora bias": Bad(settings(lora_bias=True), CheckpointUnsupported, "train with lora_bias=False"),
    "GPT-2's weights": Bad(settings(fan_in_fan_out=True), CheckpointUnsupported, "are not supported"),
    "replicated layers": Bad(settings(layer_replication=[[0, 2]]), CheckpointUnsupported, "train without them"),
    "bare parameters": Bad(settings(target_parameters=["w"]), CheckpointUnsupported, "use target_modules"),
    "aLoRA": Bad(settings(alora_invocation_tokens=[1]), CheckpointUnsupported, "train plain LoRA"),
    "QALoRA": Bad(settings(use_qalora=True), CheckpointUnsupported, "train plain LoRA"),
    "block-diagonal": Bad(settings(use_bdlora={"x": 1}), CheckpointUnsupported, "train plain LoRA"),
    "arrow": Bad(settings(arrow_config={"k": 3}), CheckpointUnsupported, "convert the single adapters"),
    "fused parts": Bad(settings(enable_lora=[True, False]), CheckpointUnsupported, "target the single layers"),
    **{
        f"start {init}": Bad(settings(init_lora_weights=init), CheckpointUnsupported, "save it converted to plain LoRA")
        for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")
    },
    **{
        f"{name} is {value!r}": Bad(
            settings(**{name: value}), CheckpointUnsupported, f"{name}={shown}: expected {what}"
        )
        for name, value, shown, what in (
            ("target_modules", 5, "5", "the name of a module, a list of names, or null"),
            ("target_modules", ["q_proj", 5], '["q_proj", 5]', "the name of a module, a list"),
            ("exclude_modules", {}, "{}", "the name of a module, a list of names, or null"),
            ("modules_to_save", "lm_head", '"lm_head"', "a list of names of modules, or null"),
            ("layers_pattern", True, "true", "the name of a module, a list of names, or null"),
        )
    },
    "IA3": Bad(settings(peft_type="IA3"), CheckpointUnsupported, "only LORA adapters are supported"),
    "a setting nobody knows": Bad(settings(use_magic=True), CheckpointUnsupported, "not known here"),
    "rank of another run": Bad(settings(r=16), CheckpointUnsupported, "of this training run"),
    "rank 0": Bad(settings(r=0), CheckpointUnsupported, "of this training run"),
    "no rank": Bad(settings(r=...), CheckpointUnsupported, "of this training run"),
    "rank pattern of another run": Bad(
        settings(rank_pattern={"q_proj": 4}), CheckpointUnsupported, "of this training run"
    ),
    "alpha in words": Bad(settings(lora_alpha="16"), CheckpointUnsupported, "write the one of the training run"),
    "alpha that is none": Bad(settings(lora_alpha=math.nan), CheckpointUnsupported, "write the one of the"),
    "a pattern that is none": Bad(settings(rank_pattern={"(": 4}), CheckpointUnsupported, "no valid pattern"),
    "alpha 0": Bad(settings(lora_alpha=0), CheckpointUnsupported, "was it saved before the first step"),
    "a head that was not saved": Bad(settings(modules_to_save=["lm_head"]), CheckpointUnsupported, "Save the check"),
    "tokens that were not saved": Bad(
        settings(trainable_token_indices=[3]), CheckpointUnsupported, "save the adapter again"
    ),
    # weights
    "rank 700": Bad(rank_700, CheckpointUnsupported, "up to rank 512 (1, 8, 16, 32, 64, 128, 256, 320, 512): merge"),
    "half a pair": Bad(without(f"{MODULE}.lora_A"), CheckpointUnsupported, "save the adapter again"),
    "ranks that differ": Bad(replaced(A, lambda t: t[:4]), CheckpointUnsupported, "lora_A has rank 4, lora_B rank 8"),
    "NaN": Bad(replaced(A, lambda t: t * math.nan), CheckpointUnsupported, "take an earlier checkpoint"),
    "infinite": Bad(replaced(B, lambda t: t + math.inf), CheckpointUnsupported, "take an earlier checkpoint"),
    "nothing learnt": Bad(
        weights(lambda ts: {n: t * ("_A." in n) for n, t in ts.items()}), CheckpointUnsupported, "was it saved before"
    ),
    "not gathered": Bad(replaced(A, lambda t: t[:0]), CheckpointUnsupported, "before its pieces were gathered"),
    "flat": Bad(replaced(A, lambda t: t.flatten()), CheckpointUnsupported, "before its pieces were gathered"),
    "whole numbers": Bad(replaced(A, lambda t: t.to(torch.int8)), CheckpointUnsupported, "save it again"),
    "a bias in LoRA": Bad(
        added(f"base_model.model.{MODULE}.lora_B.bias", 64), CheckpointUnsupported, "train with lora_bias=False"
    ),
    "a key nobody knows": Bad(added("x", 3), CheckpointUnsupported, "save the adapter with PEFT's save_pretrained"),
    "the same twice": Bad(
        added(f"module.base_model.model.{MODULE}.lora_A.weight", 8, 64), CheckpointUnsupported, "save the adapter again"
    ),
    "empty": Bad(weights(lambda ts: {}), CheckpointUnsupported, "Gather them, and save it again"),
    "rows without their numbers": Bad(
        added("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", 2, 64),
        CheckpointUnsupported,
        "put the adapter_config.json of this run beside them",
    ),
    "a magnitude without a pair": Bad(
        added("base_model.model.lm_head.lora_magnitude_vector", 272), CheckpointUnsupported, "set it to true if"
    ),
    # the base
    "a layer too many": Bad(renamed("layers.1.", "layers.7."), BaseMismatch, "the base has only 2 layers"),
    "another architecture": Bad(renamed("model.layers", "transformer.h"), BaseMismatch, "of another architecture"),
    "fused": Bad(renamed("q_proj", "qkv_proj"), BaseMismatch, "train on q_proj, k_proj, v_proj"),
    "another width": Bad(
        weights(lambda ts: {n: t[:, :32] if "_A." in n else t for n, t in ts.items()}),
        BaseMismatch,
        "the base has 64 → 64",
    ),
    "a classifier": Bad(added("base_model.model.score.weight", 2, 64), BaseMismatch, "the base has no such weight"),
    "a bias the base hasn't": Bad(
        added(f"base_model.model.{MODULE}.bias", 64), BaseMismatch, "the base has no such weight"
    ),
    # files
    "a pickle": Bad(pickled, CheckpointUnreadable, "save it as safetensors first: cd "),
    "cut": Bad(truncated, CheckpointUnreadable, "Copy or save it again"),
    "no weights": Bad(file("adapter_model.safetensors", None), CheckpointUnreadable, "copy it again"),
    "no configuration": Bad(file("adapter_config.json", None), CheckpointUnreadable, "adapter_config.json is missing"),
    "a configuration cut": Bad(file("adapter_config.json", "{"), CheckpointUnreadable, "not readable JSON"),
    "not safetensors": Bad(
        file("adapter_model.safetensors", b"PK\x03\x04"), CheckpointUnreadable, "Save it as safetensors"
    ),
    "a file elsewhere": Bad(escaping, CheckpointUnreadable, "only .safetensors files beside the index are read"),
    "a stamp that is none": Bad(file("graft_training.json", "{}"), CheckpointUnreadable, "Correct it, or remove it"),
}


def test_the_corpus_is_large_enough() -> None:
    assert len(BAD) >= 40
    assert len(GOOD) + 3 * len(trainers.TRAINERS) >= 30


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_a_bad_adapter_is_reported_with_what_to_do(lora: Path, base: Path, tmp_path: Path, out: Path, bad: Bad) -> None:
    copied = parts.copy(lora, tmp_path / "copy")
    bad.spoil(copied)

    with pytest.raises(bad.error) as caught:
        finished(copied, base, out, route="adapter", dtype="auto")

    assert bad.fix in str(caught.value)
    assert not out.exists()


ODD: dict[str, Any] = {
    "base_model_name_or_path": 7,
    "target_modules": 7,
    "modules_to_save": 7,
    "trainable_token_indices": {"embed_tokens": "all"},
    "rank_pattern": 7,
    "lora_alpha": [],
    "r": "8",
    "use_dora": "yes",
    "revision": [],
    "peft_type": None,
}


@pytest.mark.parametrize("name", ODD)
def test_a_setting_of_an_odd_type_is_reported_or_harmless(lora: Path, base: Path, tmp_path: Path, name: str) -> None:
    from convert.pipeline.inspect import inspect

    copied = parts.copy(lora, tmp_path / "copy")
    parts.edit_json(copied / "adapter_config.json", **{name: ODD[name]})

    inspect(copied, base)
    with contextlib.suppress(ConvertError):
        finished(copied, base, tmp_path / "out", measure=True)
