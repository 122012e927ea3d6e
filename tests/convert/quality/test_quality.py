from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.artifact import Artifact, Canaries, Quality, Retention
from convert.base_model import BaseModel
from convert.checkpoint import Checkpoint
from convert.errors import BaseUnreadable, CheckpointUnsupported, OutputUnwritable, QualityGateFailed, TextUnreadable
from convert.nf4 import Nf4
from convert.progress import silent
from convert.quality import DEFAULT_TEXT, Gate, Text, examine, measure, reference
from convert.quality.forward import log_probs, run
from convert.quality.gain import LEAST_GAIN, gain_kept, mean_and_error, perplexity
from convert.quality.kept import Kept
from convert.quality.model import load
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
    found = parts.logits(parts.load_stored(out / "model"), ids)[:-1]
    assert quality
    assert quality.text == "held.jsonl"
    assert quality.tokens == len(expected)
    assert quality.kl_mean == pytest.approx(parts.divergence(expected, found), rel=1e-3)


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


def compared(checkpoint: Path, base: Path, quantizer: Nf4 | None, text: Text, result: Path) -> Quality:
    """The result is a model directory with the same adapter beside it."""
    expected = reference(Checkpoint.open(checkpoint), BaseModel.open(base), quantizer, base, text, silent)
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
    place = 0
    for turn in chat:  # the tiny template opens every turn alike and closes none
        length = len(tokenizer(f"<|{turn['role']}|>{turn['content']}")["input_ids"])
        answers[max(place - 1, 0) : place + length - 1] = turn["role"] == "assistant"
        place += length
    adapted = parts.with_adapter(parts.load_float32(base), lora)
    assert quality.perplexity_reference == pytest.approx(float(losses(adapted, ids)[answers].mean().exp()), rel=1e-5)
    assert quality.tokens == len(ids) - 1


def test_a_text_without_answers_has_no_perplexity_and_no_gain(lora: Path, base: Path) -> None:
    quality = compared(lora, base, None, Text("t", ([{"role": "user", "content": "the rain in spain"}],)), base)

    assert (quality.perplexity, quality.perplexity_base, quality.gain_kept) == (None, None, None)


def test_the_gain_kept_is_1_for_the_reference_0_for_the_base_and_between_in_between() -> None:
    generator = torch.Generator().manual_seed(2)
    base = [torch.randn(30, generator=generator) - 4 for _ in range(10)]
    reference = [row + 1 for row in base]

    assert gain_kept(reference, base, reference) == pytest.approx(1)
    assert gain_kept(reference, base, base) == 0
    assert gain_kept(reference, base, [row + 0.25 for row in base]) == pytest.approx(0.25)
    assert gain_kept(reference, base, [row - 5 for row in base]) == 0
    assert gain_kept(reference, base, [row + 2 for row in base]) == pytest.approx(2)


def test_a_fine_tune_that_gains_nothing_or_only_noise_has_no_gain_to_keep() -> None:
    base = [torch.full((30,), -4.0) for _ in range(10)]
    generator = torch.Generator().manual_seed(4)
    noisy = [row + 0.05 + torch.randn(1, generator=generator) for row in base]
    little = [row + LEAST_GAIN / 2 for row in base]
    worse = [row - 1 for row in base]

    assert [gain_kept(one, base, one) for one in (noisy, little, worse)] == [None, None, None]


def test_the_error_of_a_mean_is_that_of_row_sums() -> None:
    generator = torch.Generator().manual_seed(6)
    rows = [torch.randn(20, generator=generator) + torch.randn(1, generator=generator) for _ in range(400)]

    mean, error = mean_and_error(rows)

    # With equally long rows it is the standard error of the rows' means.
    means = torch.stack([row.double().mean() for row in rows])
    assert mean == pytest.approx(float(means.mean()))
    assert error == pytest.approx(float(means.std() / 400**0.5))


def test_a_hopeless_perplexity_is_still_a_number() -> None:
    assert perplexity([torch.full((3,), -1e9)]) == pytest.approx(1.0142320547350045e304)


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_kept_of_the_reference_gives_its_distributions_back(base: Path, untied_base: Path, tied: bool) -> None:
    model = load(BaseModel.open(base if tied else untied_base), None)
    rows = [torch.randint(0, parts.VOCABULARY, (1, length)) for length in (2, 150, 65)]
    kept = Kept()
    with torch.inference_mode():
        states = [states for _, states in run(model, rows, "x", silent)]
        for each in states:
            kept.append(each)
        kept.set_head(model.lm_head.weight)
        for number, row in enumerate(rows):
            found = torch.cat(list(kept.log_probs(number)))
            assert torch.equal(found, torch.cat(list(log_probs(model, states[number]))))
            assert torch.allclose(found, parts.logits(model, row)[:-1].log_softmax(-1), atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2"])
def test_the_head_is_all_that_lies_between_states_and_logits(architecture: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes, **heads)).eval()
    row = torch.randint(0, 50, (1, 70))

    with torch.inference_mode():
        ((_, states),) = run(model, [row], "x", silent)
        found = torch.cat(list(log_probs(model, states)))

    assert torch.allclose(found, parts.logits(model, row)[:-1].log_softmax(-1), atol=1e-5)


def test_an_adapter_on_the_head_is_in_the_reference(untied_base: Path, tmp_path: Path) -> None:
    checkpoint = parts.save_adapter(untied_base, tmp_path / "head", target_modules=["lm_head", "q_proj"])
    text = Text("t", ("the rain in spain",))
    expected = reference(Checkpoint.open(checkpoint), BaseModel.open(untied_base), None, untied_base, text, silent)

    adapted = parts.with_adapter(parts.load_float32(untied_base), checkpoint)
    ids = expected.rows.measured[0]
    want = parts.logits(adapted, ids)[:-1].log_softmax(-1)
    assert torch.allclose(torch.cat(list(expected.kept.log_probs(0))), want, atol=1e-5)
    with adapted.disable_adapter():
        alone = losses(adapted, ids[0].tolist())
    assert torch.allclose(-expected.base[0].double(), alone, atol=1e-5)
    assert examine(expected, untied_base, checkpoint, silent).quality.kl_mean < 1e-7  # merged for the reference


def test_more_than_256_rows_are_measured(lora: Path, base: Path) -> None:
    text = Text("t", tuple(f"the rain in spain {number}" for number in range(300)))
    expected = reference(Checkpoint.open(lora), BaseModel.open(base), None, base, text, silent)

    assert len(expected.rows.measured) == 300
    assert measure(expected, base, lora, silent).tokens > 300 * 5


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("wb", buffering=0) as full:
        monkeypatch.setattr(tempfile, "TemporaryFile", lambda prefix: full)

        with pytest.raises(OutputUnwritable, match=r"no room for the reference's states.*TMPDIR"):
            Kept().append(torch.ones(3, 4))


GOOD = Quality(
    reference="r",
    text="t",
    tokens=100,
    kl_mean=0.01,
    kl_p99=0.1,
    top1_agreement=0.98,
    gain_kept=0.97,
    retention=Retention(mean=0.99, least=0.9, least_module="model.layers.3.mlp.up_proj"),
    canaries=Canaries(asked=2, passed=2),
)


def test_a_gate_lets_through_what_keeps_its_limits() -> None:
    Gate(max_kl=0.02, min_retention=0.9, min_gain=0.95).require(GOOD)
    Gate().require(GOOD)


def test_a_gate_lists_every_limit_that_is_not_kept_with_its_figure() -> None:
    bad = GOOD.model_copy(update={"canaries": Canaries(asked=3, passed=1)})

    with pytest.raises(QualityGateFailed) as told:
        Gate(max_kl=0.001, min_retention=0.95, min_gain=0.99).require(bad)

    for figure in ("0.010000", "--max-kl 0.001", "mlp.up_proj keeps 90.0%", "97.0%", "2 of 3 canaries"):
        assert figure in str(told.value)
    assert len(Gate(max_kl=0.001, min_retention=0.95, min_gain=0.99).failures(bad)) == 4


def test_canaries_may_fail_where_the_gate_does_not_ask_for_them() -> None:
    Gate(canaries=False).require(GOOD.model_copy(update={"canaries": Canaries(asked=3, passed=1)}))


def test_a_gain_that_can_not_be_told_fails_a_limit_on_it_and_no_other() -> None:
    unknown = GOOD.model_copy(update={"gain_kept": None})

    Gate(max_kl=0.02).require(unknown)
    with pytest.raises(QualityGateFailed, match="can't be checked: on t the fine-tune predicts no better"):
        Gate(min_gain=0.5).require(unknown)


def test_a_separate_adapter_keeps_its_delta_by_construction() -> None:
    Gate(min_retention=0.99).require(GOOD.model_copy(update={"retention": None}))
