"""Verification without an engine; checks of real engines are in tests/e2e/verification."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from convert.artifact import GOLDEN, MANIFEST, Artifact, Golden, file_sha256
from convert.cli.report.verification import verification_screen
from convert.errors import ArtifactInvalid, BaseMismatch, VerificationFailed, VerificationImpossible
from convert.verification.checks import LIMITS, Check, Difference, Limits, Subject, adapter_effect, golden_answers
from convert.verification.engine import (
    EngineOptions,
)
from convert.verification.verify import VerificationReport, VerifyOptions, golden_of, stop_token_ids, verify
from tests.convert.asking import Request, convert
from tests.convert.verification.engines import NOWHERE, WITHOUT_VLLM


def golden(tokens: int = 200, seed: int = 3, effect: float = 1.0) -> Golden:
    """One prompt whose adapter changes log-probabilities by about `effect`."""
    random = np.random.default_rng(seed)
    base = -random.exponential(3, tokens)
    result = base + random.normal(0, effect, tokens)
    prompt = {"token_ids": [2] * (tokens + 1), "reference": [*result], "result": [*result], "base": [*base]}
    return Golden.model_validate({"prompts": [prompt], "chats": [], "canaries": [], "stop_token_ids": [1]})


def subject(golden: Golden) -> Subject:
    return Subject(NOWHERE, "tiny", "base", golden, LIMITS["nf4"], frozenset())


@pytest.fixture
def artifact(qlora: Path, base: Path, tmp_path: Path) -> Artifact:
    return convert(Request(checkpoint=qlora, base=base, destination=tmp_path / "tiny", name="tiny", measure=False))


def with_golden(artifact: Artifact, golden: Golden) -> Artifact:
    path = artifact.root / GOLDEN
    path.write_text(golden.model_dump_json())
    return with_manifest(artifact, lambda manifest: manifest.update(golden=file_sha256(path)))


def with_manifest(artifact: Artifact, change: Callable[[dict[str, Any]], None]) -> Artifact:
    path = artifact.root / MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    return Artifact.open(artifact.root)


def test_the_difference_is_that_of_numpy() -> None:
    random = np.random.default_rng(5)
    first, second = random.normal(size=1000), random.normal(size=1000)
    difference = Difference.between(first.tolist(), second.tolist())

    assert difference.mean == pytest.approx(np.abs(first - second).mean())
    assert difference.p99 == np.quantile(np.abs(first - second), 0.99, method="inverted_cdf")


@pytest.mark.parametrize("broken", [float("nan"), float("-inf")])
def test_an_engine_that_gives_no_numbers_agrees_with_nothing(broken: float) -> None:
    expected = golden()
    served = [broken, *expected.prompts[0].result[1:]]

    assert golden_answers(served, subject(expected)).passed is False
    assert adapter_effect(served, expected.prompts[0].base or (), subject(expected)).passed is False


def test_noise_of_16_bit_arithmetic_is_within_the_limits_and_a_drift_beyond_it_is_not() -> None:
    expected = golden()
    noise = np.random.default_rng(6).normal(0, LIMITS["nf4"].mean / 2, 200)
    served = np.array(expected.prompts[0].result) + noise

    assert golden_answers(served.tolist(), subject(expected)).passed
    assert golden_answers((served + 2 * LIMITS["nf4"].mean).tolist(), subject(expected)).passed is False


def test_a_few_wild_tokens_fail_although_the_mean_is_small() -> None:
    expected = golden()
    served = np.array(expected.prompts[0].result)
    served[:4] += 2 * LIMITS["nf4"].p99

    assert golden_answers(served.tolist(), subject(expected)).figures["mean"] < LIMITS["nf4"].mean
    assert golden_answers(served.tolist(), subject(expected)).passed is False


@pytest.mark.parametrize(("scale", "passed"), [(1.0, True), (0.0, False), (2.0, False), (0.8, False), (-1.0, False)])
def test_the_effect_of_an_adapter_differs_from_a_wrong_scale_within_noise(scale: float, passed: bool) -> None:
    """With changes no larger than the noise, where single tokens show nothing."""
    expected = golden(tokens=20_000, effect=0.1)
    base, result = np.array(expected.prompts[0].base), np.array(expected.prompts[0].result)
    noise = np.random.default_rng(7).normal(0, 0.1, (2, len(base)))
    served = base + scale * (result - base) + noise[0]
    check = adapter_effect(served.tolist(), (base + noise[1]).tolist(), subject(expected))

    assert check.passed is passed
    assert check.figures["effect"] == pytest.approx(scale, abs=0.1)
    slope, residual, *_ = np.linalg.lstsq((result - base)[:, None], served - base - noise[1], rcond=None)
    assert check.figures["effect"] == pytest.approx(slope[0])
    assert check.figures["standard_error"] == pytest.approx(
        (residual[0] / (len(base) - 1) / ((result - base) ** 2).sum()) ** 0.5
    )


def test_an_adapter_without_effect_is_reported_as_such() -> None:
    expected = golden()
    base = expected.prompts[0].base or ()

    assert "the base answers under the adapter's name" in adapter_effect(base, base, subject(expected)).found


def test_an_effect_too_small_to_measure_is_reported_but_not_judged() -> None:
    expected = golden(effect=1e-4)
    prompt = expected.prompts[0]
    noise = np.random.default_rng(8).normal(0, 0.05, (2, 200))
    served, base = (prompt.result + noise[0]).tolist(), (prompt.base + noise[1]).tolist()
    check = adapter_effect(served, base, subject(expected))

    assert check.passed is None
    assert "too little to tell" in check.found


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config.json": {"eos_token_id": [2, 0]}, "config.json": {"eos_token_id": 7}}, {2, 0}),
        ({"generation_config.json": {"eos_token_id": 2}}, {2}),
        ({"generation_config.json": {}, "config.json": {"eos_token_id": 7}}, {7}),
        ({"config.json": {"eos_token_id": None}}, set()),
        ({}, set()),
    ],
)
def test_stop_tokens_are_read_as_vllm_reads_them(tmp_path: Path, files: dict[str, Any], expected: set[int]) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))

    assert stop_token_ids(tmp_path) == expected


def test_golden_answers_must_be_those_of_the_manifest(artifact: Artifact) -> None:
    with pytest.raises(VerificationImpossible, match="has no golden answers"):
        golden_of(artifact)
    whole = with_golden(artifact, golden())
    assert golden_of(whole) == golden()

    (artifact.root / GOLDEN).write_text(golden(seed=4).model_dump_json())
    with pytest.raises(ArtifactInvalid, match=r"golden\.json has other bytes"):
        golden_of(whole)
    (artifact.root / GOLDEN).unlink()
    with pytest.raises(ArtifactInvalid, match=r"golden\.json is missing"):
        golden_of(whole)


def test_golden_answers_that_contradict_themselves_are_refused(artifact: Artifact) -> None:
    short = json.loads(golden().model_dump_json())
    short["prompts"][0]["result"].pop()

    with pytest.raises(ArtifactInvalid, match=r"prompts\.0\.result has 199 log-probabilities for 200 tokens"):
        golden_of(with_golden(artifact, Golden.model_validate(short)))
    with pytest.raises(ArtifactInvalid, match="there are no prompts"):
        golden_of(with_golden(artifact, Golden(prompts=(), chats=(), canaries=(), stop_token_ids=())))


def test_changed_bytes_are_refused_before_anything_is_started(artifact: Artifact) -> None:
    whole = with_golden(artifact, golden())
    (artifact.root / "model" / "config.json").write_text("{}")

    with pytest.raises(ArtifactInvalid, match=r"model/config\.json has other bytes"):
        verify(whole, options=VerifyOptions(EngineOptions(python=Path("/nonexistent"))))


def test_a_shared_base_must_be_named_and_be_the_right_one(
    artifact: Artifact, qlora: Path, base: Path, untied_base: Path, tmp_path: Path
) -> None:
    shared = convert(Request(checkpoint=qlora, base=artifact.root, destination=tmp_path / "second", name="second"))
    other = with_manifest(artifact, lambda manifest: manifest["model"].update(fingerprint="0" * 64))

    with pytest.raises(VerificationImpossible, match=r"NOT VERIFIED: .* lies in another artifact.*--base"):
        verify(with_golden(shared, golden()))
    with pytest.raises(BaseMismatch, match="it holds 000000000000"):
        verify(with_golden(shared, golden()), other)
    with pytest.raises(BaseMismatch, match="it holds no model"):
        verify(with_golden(shared, golden()), shared)


def test_without_vllm_it_says_not_verified(artifact: Artifact) -> None:
    whole = with_golden(artifact, golden())
    options = VerifyOptions(EngineOptions(python=WITHOUT_VLLM))

    with pytest.raises(VerificationImpossible, match="NOT VERIFIED: vLLM is not installed"):
        verify(whole, options=options)
    with pytest.raises(VerificationImpossible, match="can't be run"):
        verify(whole, options=VerifyOptions(EngineOptions(python=Path("/nonexistent/python"))))


def report(*checks: Check) -> VerificationReport:
    return VerificationReport(Path("artifacts/tiny"), "tiny", "0.32.0", checks)


def test_a_report_passes_unless_a_check_failed_and_names_all_that_did() -> None:
    unjudged, good = Check("unjudged", None, "1", "2"), Check("good", True, "1", "1")
    bad, worse = Check("bad", False, "[1]", "2"), Check("worse", False, "3", "4", {}, ("chat 1: at [b]",))
    report(unjudged, good).require_passed()

    with pytest.raises(VerificationFailed) as failed:
        report(bad, good, worse, unjudged).require_passed()
    assert "bad: [1], expected 2; worse: 3, expected 4 (chat 1: at [b])" in str(failed.value)
    assert "good" not in str(failed.value)


def test_a_report_is_shown_to_people_and_programs() -> None:
    bad = Check("bad", False, "[1]", "2", {"mean": 0.5}, ("chat 1: at [b]",))
    console = Console(width=100, record=True, file=io.StringIO())
    for part in verification_screen(report(bad)):
        console.print(part)

    shown = console.export_text()
    assert "[1]" in shown
    assert "chat 1: at [b]" in shown
    assert "1 of 1 checks failed" in shown
    document = json.loads(json.dumps(report(bad).document()))
    assert document["passed"] is False
    assert document["checks"][0]["figures"] == {"mean": 0.5}


def test_activations_in_8_bits_get_wider_limits() -> None:
    narrow, wide = LIMITS["none"], LIMITS["w8a8-int8"]

    assert wide == LIMITS["fp8-dynamic"]
    assert isinstance(narrow, Limits)
    assert (wide.mean > narrow.mean, wide.p99 > narrow.p99) == (True, True)
