"""Which of a server's base models an adapter belongs to, and what is said where it belongs to none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from serve.adapters.admission import Admission, incompatibilities
from serve.errors import AdapterRejected
from serve.settings import AdmissionSettings, EngineSettings
from tests.serve.conftest import BASE, candidate

PIRATE = candidate("pirate", "weights")
SMALL = EngineSettings(model_path=Path(), model_name="small", fingerprint=BASE)
LARGE = EngineSettings(model_path=Path(), model_name="large", fingerprint="e" * 64, max_lora_rank=8)
MERGED = EngineSettings(model_path=Path(), model_name="ticket", fingerprint="f" * 64, max_lora_rank=0)


def test_an_adapter_is_admitted_by_the_engine_of_its_own_base_model() -> None:
    on_large = replace(PIRATE, base=LARGE.fingerprint, rank=16)

    assert incompatibilities(PIRATE, [MERGED, LARGE, SMALL]) == []
    assert [reason[:18] for reason in incompatibilities(on_large, [SMALL, LARGE])] == ["its rank 16 is abo"]


def test_an_adapter_for_a_base_model_that_is_not_served_is_told_which_ones_are() -> None:
    (reason,) = incompatibilities(PIRATE, [LARGE])

    assert reason.startswith("it was made for the base model bbbbbbbbbbbb, but large here is eeeeeeeeeeee; ")
    assert "give the artifact that holds it to `run`" in reason


def test_no_adapter_takes_the_name_of_any_base_model() -> None:
    named = replace(PIRATE, name="ticket")

    assert ["its name is the name of the base model, ticket" in reason for reason in incompatibilities(
        named, [SMALL, MERGED]
    )] == [True]  # fmt: skip


def test_a_plain_adapter_must_say_its_base_model_where_several_take_adapters() -> None:
    admission = Admission(lambda: [SMALL, MERGED, LARGE], AdmissionSettings())

    assert Admission(lambda: [MERGED, SMALL], AdmissionSettings()).engine_for(None) == SMALL
    assert admission.engine_for("large") == LARGE
    with pytest.raises(AdapterRejected, match="there are several here: small, large"):
        admission.engine_for(None)
    with pytest.raises(AdapterRejected, match="ticket is no base model that takes adapters here"):
        admission.engine_for("ticket")
