from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.artifact import Artifact, Quality
from convert.errors import BaseUnreadable, CheckpointUnsupported, QualityGateFailed, TextUnreadable
from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel
from convert.progress import silent
from convert.quality import Text, compute_reference, examine, measure
from convert.quality.text import DEFAULT_TEXT
from convert.quantization.nf4 import Nf4
from tests.convert import parts
from tests.convert.asking import Request, convert


def measured(checkpoint: Path, base: Path, out: Path, **settings: Any) -> Artifact:
    return convert(Request(checkpoint=checkpoint, base=base, destination=out, name="tiny", **settings))


def rows(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_the_exact_route_loses_next_to_nothing(qlora: Path, base: Path, out: Path) -> None:
    quality = measured(qlora, base, out, route="merge", quantize="none").manifest.quality

    assert quality
    assert quality.kl_mean <= 1e-4
    assert quality.top1_agreement > 0.97
    assert (quality.text, quality.tokens > 500) == ("default", True)
    assert "dequantized" in quality.reference


def test_a_4_bit_result_loses_more_and_says_so(lora: Path, base: Path, tmp_path: Path) -> None:
    merged = measured(lora, base, tmp_path / "merged", quantize="nf4").manifest.quality
    separate = measured(lora, base, tmp_path / "separate", route="adapter").manifest.quality
    exact = measured(lora, base, tmp_path / "exact", route="merge", quantize="none").manifest.quality

    assert merged
    assert separate
    assert exact
    assert min(merged.kl_mean, separate.kl_mean) > 20 * exact.kl_mean
    assert merged.kl_p99 >= merged.kl_mean


def test_the_figure_is_the_divergence_computed_by_hand(lora: Path, base: Path, tmp_path: Path, out: Path) -> None:
    from transformers import AutoTokenizer

    text = "the rain in spain"
    quality = measured(lora, base, out, quantize="nf4", text=rows(tmp_path / "held.jsonl", text)).manifest.quality

    ids = torch.tensor([AutoTokenizer.from_pretrained(base)(text)["input_ids"]])
    expected = parts.logits(parts.with_adapter(parts.load_float32(base), lora), ids)[:-1]
    actual = parts.logits(parts.load_stored(out / "model"), ids)[:-1]
    assert quality
    assert quality.text == "held.jsonl"
    assert quality.tokens == len(expected)
    assert quality.kl_mean == pytest.approx(parts.divergence(expected, actual), rel=1e-3)


def test_above_the_limit_nothing_is_published(lora: Path, base: Path, out: Path) -> None:
    with pytest.raises(QualityGateFailed, match=r"above --max-kl 1e-06.*Nothing was published"):
        measured(lora, base, out, quantize="nf4", max_kl=1e-6)

    assert not out.exists()


def test_below_the_limit_it_is(lora: Path, base: Path, out: Path) -> None:
    assert measured(lora, base, out, max_kl=100.0).root == out


def test_chats_are_rendered_with_the_template(lora: Path, base: Path, tmp_path: Path, out: Path) -> None:
    held = tmp_path / "chat.jsonl"
    held.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}) + "\n")

    quality = measured(lora, base, out, text=held).manifest.quality

    assert quality
    assert quality.tokens == len("<|user|>hi") - 1  # the tiny tokenizer has a token a character


def test_a_chat_the_template_refuses_is_an_error(lora: Path, base: Path, tmp_path: Path, out: Path) -> None:
    copied = parts.copy(base, tmp_path / "copy")
    (copied / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")

    with pytest.raises(TextUnreadable, match="refuses a chat of user, assistant: roles must alternate"):
        measured(lora, copied, out)


def test_target_modules_that_do_not_fit_the_weights_are_an_error(
    lora: Path, base: Path, tmp_path: Path, out: Path
) -> None:
    copied = parts.copy(lora, tmp_path / "copy")
    parts.edit_json(copied / "adapter_config.json", target_modules=["c_attn"])

    with pytest.raises(CheckpointUnsupported, match="PEFT can't apply"):
        measured(copied, base, out)


@pytest.mark.parametrize("changed", [{"hidden_act": "wave"}, {"head_dim": 0}, {"intermediate_size": -1}], ids=str)
def test_a_configuration_transformers_cannot_read_is_an_error(
    lora: Path, base: Path, tmp_path: Path, out: Path, changed: dict[str, Any]
) -> None:
    copied = parts.copy(base, tmp_path / "copy")
    parts.edit_json(copied / "config.json", **changed)

    with pytest.raises(BaseUnreadable, match=r"makes no model|config\.json: (head_dim|intermediate_size) is"):
        measured(lora, copied, out)


def test_no_measure_leaves_it_out(lora: Path, base: Path, out: Path) -> None:
    assert measured(lora, base, out, measure=False).manifest.quality is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        '{"prompt": "x"}',
        '{"messages": []}',
        '{"messages": [{"role": "user"}]}',
        "[1]",
        '{"text": 3}',
        r'{"text": "\ud800"}',
    ],
)
def test_an_invalid_text_is_an_error(tmp_path: Path, content: str) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text(content)

    with pytest.raises(TextUnreadable, match=r"held\.jsonl"):
        Text.open(held)


def test_a_missing_text_is_refused_before_anything_is_written(lora: Path, base: Path, out: Path) -> None:
    with pytest.raises(TextUnreadable, match="can't be read"):
        measured(lora, base, out, text=out.parent / "nothing.jsonl")


def test_text_too_short_to_compare_is_an_error(lora: Path, base: Path, tmp_path: Path, out: Path) -> None:
    with pytest.raises(TextUnreadable, match="two tokens"):
        measured(lora, base, out, text=rows(tmp_path / "short.jsonl", "a"))


def test_the_default_text_is_varied_and_small() -> None:
    text = Text.open(None)

    assert len(text.rows) == 12
    assert {type(row) for row in text.rows} == {str, list}
    assert DEFAULT_TEXT.stat().st_size < 10_000


def compared(checkpoint: Path, base: Path, quantizer: Nf4 | None, text: Text, result: Path) -> Quality:
    """The result is a model directory with the same adapter beside it."""
    expected = compute_reference(Checkpoint.open(checkpoint), BaseModel.open(base), quantizer, base, text, silent)
    return measure(expected, result, checkpoint, silent)


def losses(model: Any, ids: list[int]) -> torch.Tensor:
    log_probs = parts.logits(model, torch.tensor([ids])).double().log_softmax(-1)
    return -log_probs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_the_same_function_differs_by_nothing_at_all(qlora: Path, base: Path, nf4_base: Path) -> None:
    quality = compared(qlora, base, Nf4(), Text.open(None), nf4_base)

    assert (quality.kl_mean, quality.kl_p99, quality.top1_agreement) == (0.0, 0.0, 1.0)
    assert quality.perplexity == quality.perplexity_reference


def test_perplexities_are_those_of_transformers_and_peft(lora: Path, base: Path, nf4_base: Path) -> None:
    from transformers import AutoTokenizer

    text = "the rain in spain stays mainly in the plain"
    ids = AutoTokenizer.from_pretrained(base)(text)["input_ids"]
    quality = compared(lora, base, None, Text("t", (text,)), nf4_base)

    model = parts.load_float32(base)
    assert quality.perplexity_base == pytest.approx(float(losses(model, ids).mean().exp()), rel=1e-5)
    adapted = parts.with_adapter(model, lora)
    assert quality.perplexity_reference == pytest.approx(float(losses(adapted, ids).mean().exp()), rel=1e-5)
    result = parts.with_adapter(parts.load_stored(nf4_base), lora)
    assert quality.perplexity == pytest.approx(float(losses(result, ids).mean().exp()), rel=1e-4)


def test_of_a_chat_perplexity_counts_the_answers_and_divergence_all(lora: Path, base: Path) -> None:
    from transformers import AutoTokenizer

    chat = [
        {"role": "user", "content": "the rain"},
        {"role": "assistant", "content": "in spain"},
        {"role": "user", "content": "stays"},
        {"role": "assistant", "content": "mainly"},
    ]
    quality = compared(lora, base, None, Text("t", (chat,)), base)

    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False))["input_ids"]
    answers = torch.zeros(len(ids) - 1, dtype=torch.bool)
    start = 0
    for turn in chat:  # the tiny template opens every turn alike and closes none
        length = len(tokenizer(f"<|{turn['role']}|>{turn['content']}")["input_ids"])
        answers[max(start - 1, 0) : start + length - 1] = turn["role"] == "assistant"
        start += length
    adapted = parts.with_adapter(parts.load_float32(base), lora)
    assert quality.perplexity_reference == pytest.approx(float(losses(adapted, ids)[answers].mean().exp()), rel=1e-5)
    assert quality.tokens == len(ids) - 1


def test_a_text_without_answers_has_no_perplexity_and_no_gain(lora: Path, base: Path) -> None:
    quality = compared(lora, base, None, Text("t", ([{"role": "user", "content": "the rain in spain"}],)), base)

    assert (quality.perplexity, quality.perplexity_base, quality.gain_kept) == (None, None, None)


@pytest.mark.parametrize("settings", [{}, {"target_modules": ["q_proj", "lm_head"]}], ids=["linears", "tied head"])
def test_the_distance_of_the_base_is_the_divergence_computed_by_hand(
    base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    from transformers import AutoTokenizer

    text = "the rain in spain stays mainly in the plain"
    adapter = parts.save_adapter(base, tmp_path / "adapter", **settings)
    quality = compared(adapter, base, None, Text("t", (text,)), base)

    ids = torch.tensor([AutoTokenizer.from_pretrained(base)(text)["input_ids"]])
    alone = parts.logits(parts.load_float32(base), ids)[:-1]
    expected = parts.logits(parts.with_adapter(parts.load_float32(base), adapter), ids)[:-1]
    assert quality.kl_base == pytest.approx(parts.divergence(expected, alone), rel=1e-3)
    assert quality.distance_kept == pytest.approx(1 - quality.kl_mean / quality.kl_base)


def test_an_adapter_on_the_head_is_in_the_reference(untied_base: Path, tmp_path: Path) -> None:
    checkpoint = parts.save_adapter(untied_base, tmp_path / "head", target_modules=["lm_head", "q_proj"])
    text = Text("t", ("the rain in spain",))
    expected = compute_reference(
        Checkpoint.open(checkpoint), BaseModel.open(untied_base), None, untied_base, text, silent
    )

    adapted = parts.with_adapter(parts.load_float32(untied_base), checkpoint)
    ids = expected.tokens.measured[0]
    adapted_log_probs = parts.logits(adapted, ids)[:-1].log_softmax(-1)
    assert torch.allclose(torch.cat(list(expected.logits.log_probs(0, ids.shape[1] - 1))), adapted_log_probs, atol=1e-5)
    with adapted.disable_adapter():
        alone = losses(adapted, ids[0].tolist())
    assert torch.allclose(-expected.base_token_log_probs[0].double(), alone, atol=1e-5)
    assert examine(expected, untied_base, checkpoint, silent).quality.kl_mean < 1e-7  # merged for the reference


def test_more_than_256_rows_are_measured(lora: Path, base: Path) -> None:
    text = Text("t", tuple(f"the rain in spain {number}" for number in range(300)))
    expected = compute_reference(Checkpoint.open(lora), BaseModel.open(base), None, base, text, silent)

    assert len(expected.tokens.measured) == 300
    assert measure(expected, base, lora, silent).tokens > 300 * 5
