from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from convert.errors import OutputUnwritable
from convert.inputs.base_model import BaseModel
from convert.progress import silent
from convert.quality.models.streamed_model import StreamedModel
from convert.quality.reference_logits import ReferenceLogits
from convert.quality.tokenized_text import TokenizedText
from tests.convert import parts


@pytest.mark.parametrize("tied", [True, False])
def test_stored_states_give_the_distributions_of_the_model_back(base: Path, untied_base: Path, tied: bool) -> None:
    directory = base if tied else untied_base
    model = StreamedModel(BaseModel.open(directory))
    rows = [torch.randint(0, parts.VOCABULARY, (1, length)) for length in (2, 150, 65)]
    tokens = TokenizedText(tuple(rows), (), (), 0, ())
    stored = ReferenceLogits(model, tokens)
    with torch.inference_mode():
        of_itself = stored.compute(nullcontext, silent)
        restored = torch.cat(list(stored.log_probs(0, 1 + 149 + 64)))

    whole = parts.load_float32(directory)
    expected = torch.cat([parts.logits(whole, row)[:-1].log_softmax(-1) for row in rows])
    assert torch.allclose(restored, expected, atol=1e-5)
    assert (of_itself.divergences.shape, float(of_itself.divergences.max())) == ((214,), 0.0)
    by_hand = expected.gather(1, torch.cat([row[0, 1:] for row in rows])[:, None])[:, 0]
    assert torch.allclose(torch.cat(of_itself.token_log_probs), by_hand, atol=1e-5)


def test_a_full_disk_is_an_error(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("wb", buffering=0) as full:
        monkeypatch.setattr(tempfile, "TemporaryFile", lambda prefix: full)

        model = StreamedModel(BaseModel.open(base))
        tokens = TokenizedText((parts.PROMPT,), (), (), 0, ())
        with (
            torch.inference_mode(),
            pytest.raises(OutputUnwritable, match=r"no room for the reference's states.*TMPDIR"),
        ):
            ReferenceLogits(model, tokens).compute(nullcontext, silent)
