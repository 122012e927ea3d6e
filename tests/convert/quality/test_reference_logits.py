from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch

from convert.errors import OutputUnwritable
from convert.inputs.base_model import BaseModel
from convert.progress import silent
from convert.quality.float32_model import hidden_states, load, log_probs
from convert.quality.reference_logits import ReferenceLogits
from tests.convert import parts


@pytest.mark.parametrize("tied", [True, False])
def test_stored_logits_give_the_distributions_of_the_model_back(base: Path, untied_base: Path, tied: bool) -> None:
    model = load(BaseModel.open(base if tied else untied_base), None)
    rows = [torch.randint(0, parts.VOCABULARY, (1, length)) for length in (2, 150, 65)]
    stored = ReferenceLogits()
    with torch.inference_mode():
        states = [states for _, states in hidden_states(model, rows, "x", silent)]
        for row_states in states:
            stored.append(row_states)
        stored.set_output_layers(model)
        for number, row in enumerate(rows):
            restored = torch.cat(list(stored.log_probs(number)))
            assert torch.equal(restored, torch.cat(list(log_probs(model, states[number]))))
            assert torch.allclose(restored, parts.logits(model, row)[:-1].log_softmax(-1), atol=1e-5)


def test_a_full_disk_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("wb", buffering=0) as full:
        monkeypatch.setattr(tempfile, "TemporaryFile", lambda prefix: full)

        with pytest.raises(OutputUnwritable, match=r"no room for the reference's states.*TMPDIR"):
            ReferenceLogits().append(torch.ones(3, 4))
