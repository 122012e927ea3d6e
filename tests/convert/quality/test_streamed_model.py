"""A model read a layer at a time is the model of transformers and PEFT, which have all of it in memory."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from convert.artifact import Quality
from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.architecture import FAMILIES
from convert.inputs.base_model import BaseModel
from convert.inputs.chat.tokenizer import Tokenizer
from convert.progress import silent
from convert.quality import Canary, Reference, Text, compute_reference, examine
from convert.quality import canaries as asked
from convert.quality.models import layer_weights, streamed_model, vocabulary
from convert.quantization.nf4 import Nf4
from tests.convert import families, parts

TEXT = Text("t", ("the rain in spain stays mainly in the plain", "the plain", "mainly in spain, in the rain" * 5))
ANSWER_TOKENS = 9
# The first three are asked together, as long as the longest of them, and the last one after them.
QUESTIONS = (
    "the rain",
    "why does it stay mainly in the plain?",
    "the plain of spain",
    "why does it stay mainly in the plain, and where does it rain?",
)
CANARIES = [Canary(({"role": "user", "content": question},), "x") for question in QUESTIONS]


@pytest.fixture(autouse=True)
def in_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """No layer stays in memory, and everything that is done by parts has several of them."""
    monkeypatch.setattr(layer_weights, "CACHED_BYTES", 0)
    monkeypatch.setattr(streamed_model, "GROUP_TOKENS", 100)
    monkeypatch.setattr(asked, "ANSWER_TOKENS", ANSWER_TOKENS)
    monkeypatch.setattr(asked, "_BATCH_TOKENS", 100)
    monkeypatch.setattr(vocabulary, "HEAD_BLOCK_BYTES", 4 * 64 * 100)
    monkeypatch.setattr(vocabulary, "LOGITS_BYTES", 4 * parts.VOCABULARY * 7)


def reference(checkpoint: Path, base: Path, quantizer: Nf4 | None = None) -> Reference:
    return compute_reference(
        Checkpoint.open(checkpoint), BaseModel.open(base), quantizer, base, TEXT, silent, canaries=CANARIES
    )


def kl(expected: Reference, trained: Any, other: Any) -> float:
    """Of the measured rows, by models that are wholly in memory."""
    of_rows = [(parts.logits(trained, ids)[:-1], parts.logits(other, ids)[:-1]) for ids in expected.tokens.measured]
    one, another = (torch.cat(side) for side in zip(*of_rows, strict=True))
    return parts.divergence(one, another)


def answers(model: Any, directory: Path) -> list[str]:
    """Each by itself, of transformers' own generation."""
    tokenizer = Tokenizer.open(directory)
    texts = []
    for canary in CANARIES:
        prompt = torch.tensor([tokenizer.prompt_ids(canary.messages)])
        generated = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            eos_token_id=list(tokenizer.stop_ids),
            pad_token_id=0,
        )
        texts.append(tokenizer.text(generated[0, prompt.shape[1] :].tolist()))
    return texts


def quality_of(expected: Reference, model: Path, adapter: Path | None) -> tuple[Quality, list[str]]:
    examination = examine(expected, model, adapter, silent)
    return examination.quality, [answer.text for answer in examination.answers]


def same(figure: float | None) -> Any:
    """The figure, to the rounding of float32."""
    return pytest.approx(figure, abs=1e-7, rel=1e-5)


@pytest.fixture(scope="module", params=FAMILIES)
def tuned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and an adapter of one family."""
    return families.save_tuned(request.param, tmp_path_factory.mktemp(request.param))


def test_every_family_has_the_distances_and_the_answers_of_the_whole_model(tuned: tuple[Path, Path]) -> None:
    base, adapter = tuned
    expected = reference(adapter, base)
    with_it, its_answers = quality_of(expected, base, adapter)
    without, other_answers = quality_of(expected, base, None)

    alone, trained = families.load(base), PeftModel.from_pretrained(families.load(base), str(adapter)).eval()
    distance = kl(expected, trained, alone)
    assert distance > 0.01
    assert (expected.kl_base, without.kl_mean) == (same(distance), same(distance))
    assert with_it.kl_mean < 1e-9
    assert [answer.text for answer in expected.answers] == its_answers == answers(trained, base)
    assert other_answers == answers(alone, base)


def test_layers_that_see_different_parts_of_a_row_get_their_own_masks(tmp_path: Path) -> None:
    base = families.save_base("gemma2", tmp_path / "base")
    parts.edit_json(base / "config.json", sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    adapter = families.save_adapter(base, tmp_path / "adapter")
    expected = reference(adapter, base)

    alone, trained = families.load(base), PeftModel.from_pretrained(families.load(base), str(adapter)).eval()
    assert expected.kl_base == same(kl(expected, trained, alone))
    assert [answer.text for answer in expected.answers] == answers(trained, base)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3, 17, 101]},
        {"bias": "all"},
        {"use_dora": True},
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["up_proj", "post_attention_layernorm"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_what_an_adapter_changes_besides_linear_layers_is_there_and_can_be_left_out(
    tmp_path: Path, settings: dict[str, Any], tied: bool
) -> None:
    base = parts.save_base(tmp_path / "base", tied=tied, biases="bias" in settings)
    adapter = parts.save_adapter(base, tmp_path / "adapter", **settings)
    torch.manual_seed(2)
    parts.edit_weights(
        adapter,
        lambda tensors: {
            name: tensor if ".lora_" in name else tensor + 0.05 * torch.randn_like(tensor)
            for name, tensor in tensors.items()
        },
    )
    expected = reference(adapter, base)
    quality, its_answers = quality_of(expected, base, adapter)

    trained = parts.with_adapter(parts.load_float32(base), adapter)
    assert expected.kl_base == same(kl(expected, trained, parts.load_float32(base)))
    assert quality.kl_mean < 1e-9
    assert [answer.text for answer in expected.answers] == its_answers == answers(trained, base)


def test_the_dequantized_weights_are_the_same_however_often_they_are_read(
    qlora: Path, base: Path, nf4_base: Path
) -> None:
    expected = reference(qlora, base, Nf4())

    alone = parts.dequantized_model(base)
    assert expected.kl_base == same(kl(expected, parts.with_adapter(parts.dequantized_model(base), qlora), alone))
    assert quality_of(expected, nf4_base, qlora)[0].kl_mean == 0.0
    trained = parts.with_adapter(alone, qlora)
    assert [answer.text for answer in expected.answers] == answers(trained, base)


def test_a_layer_leaves_the_memory_before_the_next_one_is_read(
    lora: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = BaseModel.open(base)
    model = streamed_model.StreamedModel(opened)
    weights = [
        {name: parameter for name, parameter in layer.named_parameters() if parameter.dim() > 1}
        for layer in model.model.model.layers
    ]
    in_memory: list[list[int]] = []

    def look(*_: Any) -> None:
        in_memory.append([sum(p.untyped_storage().nbytes() > 4 for p in layer.values()) for layer in weights])

    for layer in model.model.model.layers:
        layer.register_forward_hook(look)
    with torch.inference_mode():
        list(model.hidden_states([parts.PROMPT], (nullcontext,), "x", silent))
        model.generate(input_ids=parts.PROMPT, max_new_tokens=2, do_sample=False)

    without, run = [[0, 0], [0, 0]], [[7, 0], [0, 7]]
    assert in_memory == [*without, *run, *without, *run, *run]
