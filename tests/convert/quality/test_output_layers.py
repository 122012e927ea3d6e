"""Families that scale or cap their logits, against the model's own forward of transformers, and PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel
from convert.progress import silent
from convert.quality import Text, collect_golden, compute_reference, examine
from convert.quality.models.output_layers import logits_of
from convert.routes.distillation import DistillationExample, Student, divergence
from tests.convert import families, parts
from tests.convert.families import FAMILIES, WITH_OTHER_LOGITS, random_model


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_states_are_those_of_the_models_own_forward(family: str) -> None:
    model = random_model(family)
    row = torch.randint(0, parts.VOCABULARY, (1, 70))

    with torch.inference_mode():
        states = model.get_decoder()(input_ids=row, use_cache=False).last_hidden_state[0]
        actual = logits_of(model, states)
        by_head_alone = torch.nn.functional.linear(states, model.get_output_embeddings().weight)

    expected = parts.logits(model, row)
    difference = by_head_alone.log_softmax(-1) - expected.log_softmax(-1)
    assert (family in WITH_OTHER_LOGITS) == (difference.abs().max() > 0.1)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.fixture(scope="module", params=WITH_OTHER_LOGITS)
def tuned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and an adapter of one family."""
    return families.save_tuned(request.param, tmp_path_factory.mktemp(request.param))


def test_golden_answers_and_distances_are_those_of_peft(tuned: tuple[Path, Path]) -> None:
    base, adapter = tuned
    text = Text("t", ("the rain in spain stays mainly in the plain",))
    expected = compute_reference(Checkpoint.open(adapter), BaseModel.open(base), None, base, text, silent)
    golden = collect_golden(expected, examine(expected, base, adapter, silent), base, separate=True)

    alone = families.load(base)
    ids = expected.tokens.measured[0]
    of_base = parts.logits(alone, ids)[:-1]
    of_tuned = parts.logits(PeftModel.from_pretrained(alone, adapter).eval(), ids)[:-1]
    assert expected.kl_base == pytest.approx(parts.divergence(of_tuned, of_base), rel=1e-3)
    prompt = next(
        prompt for prompt in golden.prompts if list(prompt.token_ids) == ids[0, : len(prompt.token_ids)].tolist()
    )
    for said, logits in ((prompt.base, of_base), (prompt.reference, of_tuned), (prompt.result, of_tuned)):
        assert said
        own = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[: len(said), 0]
        assert said == pytest.approx(own.tolist(), abs=2e-5)


@pytest.mark.parametrize("family", WITH_OTHER_LOGITS)
def test_a_student_that_is_its_teacher_is_no_nats_away_from_it(family: str) -> None:
    model = random_model(family)
    row = torch.randint(0, parts.VOCABULARY, (1, 40))
    taught = DistillationExample.of(row, parts.logits(model, row)[:-1].log_softmax(-1))

    assert divergence(Student(model, ["model.layers.0.self_attn.q_proj"], 2), [taught]) < 1e-6
