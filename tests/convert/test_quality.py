from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.artifact import Artifact
from convert.conversion import Request, convert
from convert.errors import BaseUnreadable, CheckpointUnsupported, QualityGateFailed, TextUnreadable
from convert.quality import DEFAULT_TEXT, Text
from tests.convert import parts


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
    merged = measured(lora, base, tmp_path / "merged").manifest.quality
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
    quality = measured(lora, base, out, text=rows(tmp_path / "held.jsonl", text)).manifest.quality

    ids = torch.tensor([AutoTokenizer.from_pretrained(base)(text)["input_ids"]])
    expected = parts.logits(parts.with_adapter(parts.load_float32(base), lora), ids)[:-1]
    found = parts.logits(parts.load_stored(out / "model"), ids)[:-1]
    assert quality
    assert quality.text == "held.jsonl"
    assert quality.tokens == len(expected)
    assert quality.kl_mean == pytest.approx(parts.divergence(expected, found), rel=1e-3)


def test_above_the_limit_nothing_is_published(lora: Path, base: Path, out: Path) -> None:
    with pytest.raises(QualityGateFailed, match=r"above --max-kl 1e-06.*Nothing was published"):
        measured(lora, base, out, max_kl=1e-6)

    assert not out.exists()


def test_below_the_limit_it_is(lora: Path, base: Path, out: Path) -> None:
    assert measured(lora, base, out, max_kl=100.0).root == out


def test_chats_are_rendered_with_the_template(lora: Path, base: Path, tmp_path: Path, out: Path) -> None:
    held = tmp_path / "chat.jsonl"
    held.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}) + "\n")

    quality = measured(lora, base, out, text=held).manifest.quality

    assert quality
    assert quality.tokens == len("<|user|>hi") - 1  # the tiny tokenizer has a token a character


def test_a_chat_the_template_refuses_is_told(lora: Path, base: Path, tmp_path: Path, out: Path) -> None:
    copied = parts.copy(base, tmp_path / "copy")
    (copied / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")

    with pytest.raises(TextUnreadable, match="refuses a chat of user, assistant: roles must alternate"):
        measured(lora, copied, out)


def test_target_modules_that_do_not_fit_the_weights_are_told(lora: Path, base: Path, tmp_path: Path, out: Path) -> None:
    copied = parts.copy(lora, tmp_path / "copy")
    parts.edit_json(copied / "adapter_config.json", target_modules=["c_attn"])

    with pytest.raises(CheckpointUnsupported, match="PEFT can't apply"):
        measured(copied, base, out)


def test_a_configuration_transformers_cannot_read_is_told(lora: Path, base: Path, tmp_path: Path, out: Path) -> None:
    copied = parts.copy(base, tmp_path / "copy")
    parts.edit_json(copied / "config.json", model_type="unheard-of")

    with pytest.raises(BaseUnreadable, match="makes no model"):
        measured(lora, copied, out)


def test_no_measure_leaves_it_out(lora: Path, base: Path, out: Path) -> None:
    assert measured(lora, base, out, measure=False).manifest.quality is None


@pytest.mark.parametrize(
    "content",
    ["", "{", '{"prompt": "x"}', '{"messages": []}', '{"messages": [{"role": "user"}]}', "[1]", '{"text": 3}'],
)
def test_a_text_in_another_form_is_told(tmp_path: Path, content: str) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text(content)

    with pytest.raises(TextUnreadable, match=r"held\.jsonl"):
        Text.open(held)


def test_a_text_that_is_not_there_is_told_before_anything_is_written(lora: Path, base: Path, out: Path) -> None:
    with pytest.raises(TextUnreadable, match="can't be read"):
        measured(lora, base, out, text=out.parent / "nothing.jsonl")


def test_text_too_short_to_compare_is_told(lora: Path, base: Path, tmp_path: Path, out: Path) -> None:
    with pytest.raises(TextUnreadable, match="two tokens"):
        measured(lora, base, out, text=rows(tmp_path / "short.jsonl", "a"))


def test_the_default_text_is_varied_and_small() -> None:
    text = Text.open(None)

    assert len(text.rows) == 12
    assert {type(row) for row in text.rows} == {str, list}
    assert DEFAULT_TEXT.stat().st_size < 10_000
