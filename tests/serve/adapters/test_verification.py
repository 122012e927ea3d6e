from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from convert.artifact import Golden, GoldenPrompt
from serve.adapters.verification import RevisionVerifier
from serve.catalogue.adapter_store import AdapterStore
from serve.catalogue.candidate import Candidate
from serve.catalogue.storage.object_store import DirectoryStore
from serve.errors import AdapterRejected, AdapterUnavailable
from serve.settings import AdmissionSettings
from tests.serve.conftest import candidate
from tests.serve.fakes import FakeEngine

PIRATE = candidate("pirate", "1")


@pytest.fixture
def golden_store(tmp_path: Path, engine: FakeEngine) -> AdapterStore:
    engine.resident = {PIRATE.adapter}
    return AdapterStore(tmp_path / "adapters", DirectoryStore(tmp_path))


def with_golden(store: AdapterStore, tokens: int = 3, result: float = -2.0) -> Candidate:
    values = (result,) * (tokens - 1)
    prompt = GoldenPrompt(token_ids=tuple(range(tokens)), reference=values, result=values, base=(-1.0,) * (tokens - 1))
    return with_content(store, Golden(prompts=(prompt,), chats=(), canaries=(), stop_token_ids=()).model_dump_json())


def with_content(store: AdapterStore, content: str) -> Candidate:
    digest = hashlib.sha256(content.encode()).hexdigest()
    store.put_golden(digest, content.encode())
    return replace(PIRATE, golden=digest)


async def test_an_adapter_that_changes_the_base_and_keeps_its_word_is_proven(
    engine: FakeEngine, golden_store: AdapterStore
) -> None:
    verifier = RevisionVerifier(engine, golden_store, AdmissionSettings())

    await verifier.verify(PIRATE)
    await verifier.verify(with_golden(golden_store))


@pytest.mark.parametrize("says", [-1.0, -1.004, float("nan")])
async def test_an_adapter_that_changes_nothing_is_refused(
    engine: FakeEngine, golden_store: AdapterStore, says: float
) -> None:
    engine.says = {None: -1.0, PIRATE.adapter: says}

    with pytest.raises(AdapterRejected, match="changes nothing"):
        await RevisionVerifier(engine, golden_store, AdmissionSettings()).verify(PIRATE)


async def test_the_base_model_is_asked_once_for_all_proofs(engine: FakeEngine, golden_store: AdapterStore) -> None:
    verifier = RevisionVerifier(engine, golden_store, AdmissionSettings())

    for _ in range(3):
        await verifier.verify(PIRATE)

    assert engine.probed == [None, *[PIRATE.adapter] * 3]


async def test_the_probe_can_be_left_out(engine: FakeEngine, golden_store: AdapterStore) -> None:
    engine.says = {None: -1.0, PIRATE.adapter: -1.0}

    await RevisionVerifier(engine, golden_store, AdmissionSettings(least_change_nats=0)).verify(PIRATE)


@pytest.mark.parametrize("result", [-2.3, -1.7, -9.0])
async def test_an_adapter_that_answers_otherwise_than_when_it_was_converted_is_refused(
    engine: FakeEngine, golden_store: AdapterStore, result: float
) -> None:
    with pytest.raises(AdapterRejected, match=r"on its golden prompts .* from the base model's"):
        await RevisionVerifier(engine, golden_store, AdmissionSettings()).verify(
            with_golden(golden_store, result=result)
        )


async def test_a_golden_prompt_longer_than_the_engine_takes_is_passed_over(
    engine: FakeEngine, golden_store: AdapterStore
) -> None:
    await RevisionVerifier(engine, golden_store, AdmissionSettings()).verify(
        with_golden(golden_store, tokens=65, result=-9)
    )


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        '{"prompts": [{"token_ids": [1, 2, 3], "reference": [-1], "result": [-2]}], "chats": [], "canaries": [], '
        '"stop_token_ids": []}',
    ],
)
async def test_golden_answers_in_another_form_are_reported(
    engine: FakeEngine, golden_store: AdapterStore, content: str
) -> None:
    with pytest.raises(AdapterRejected, match=r"golden\.json"):
        await RevisionVerifier(engine, golden_store, AdmissionSettings()).verify(with_content(golden_store, content))


async def test_golden_answers_that_are_gone_or_changed_are_reported(
    engine: FakeEngine, golden_store: AdapterStore, tmp_path: Path
) -> None:
    asked = with_golden(golden_store)
    (tmp_path / "golden" / f"{asked.golden}.json").write_text("{}")

    with pytest.raises(AdapterUnavailable):
        await RevisionVerifier(engine, golden_store, AdmissionSettings()).verify(asked)
