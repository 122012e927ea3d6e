"""Real vLLM on artifacts that are what they say, and on artifacts that were broken on purpose."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.artifact import Artifact
from convert.errors import VerificationFailed
from convert.verification.checks import LIMITS, Check, Subject, examine
from convert.verification.client import EngineClient, RequestRefused
from convert.verification.engine import EngineOptions, ServedModel, running_engine
from convert.verification.verify import VerifyOptions, golden_of, stop_token_ids, verify
from tests.convert import parts
from tests.e2e.conftest import convert, fine_tune
from tests.e2e.verification.answers import signed, with_golden

SMALL = EngineOptions(vllm_args=("--kv-cache-memory-bytes", str(64 << 20)))
OPTIONS = VerifyOptions(SMALL, answer_tokens=8)
CONTEXT_TOKENS = 512
# It writes the date, unless it is given one, and ends answers with another token than the base's EOS.
END = "<|end|>"
TEMPLATE = "{{ date_string if date_string is defined else 'today' }}" + parts.TEMPLATE.replace(
    "{% endfor %}", END + "{% endfor %}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("verification") / "tiny-llama"
    parts.save_base(directory, tied=True, hidden=128)
    parts.save_tokenizer(directory, tokens=(END,), template=TEMPLATE)
    return directory


@pytest.fixture(scope="module")
def checkpoint(base: Path) -> Path:
    return fine_tune(base, base.parent / "french", seed=0)


@pytest.fixture(scope="module")
def separate(base: Path, checkpoint: Path) -> Artifact:
    """A QLoRA adapter on its 4-bit base."""
    out = base.parent / "artifacts" / "french"
    convert(checkpoint, base, out, "--no-measure")
    return with_golden(out, base, checkpoint)


@pytest.fixture(scope="module")
def merged(base: Path, checkpoint: Path) -> Artifact:
    """The same, merged as trained into 16 bits."""
    out = base.parent / "artifacts" / "french-merged"
    convert(checkpoint, base, out, "--no-measure", "--route", "merge", "--quantize", "none")
    return with_golden(out, base, checkpoint)


@pytest.fixture(scope="module")
def variants(separate: Artifact, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters that vLLM loads without a word; all but `pattern` are another function."""
    home = tmp_path_factory.mktemp("variants")
    assert separate.adapter_path
    names = ("zeroed", "doubled", "pattern", "dropped", "nowhere")
    adapters = {name: parts.copy(separate.adapter_path, home / name) for name in names}
    parts.edit_weights(adapters["zeroed"], lambda tensors: scaled(tensors, "lora_B", 0))
    parts.edit_weights(adapters["doubled"], lambda tensors: scaled(tensors, "lora_B", 2))
    for name in ("pattern", "dropped"):
        parts.edit_weights(adapters[name], lambda tensors: scaled(tensors, "down_proj.lora_B", 1 / 8))
    # With its alpha for these modules the function is as before; without, a part of it is lost.
    parts.edit_json(adapters["pattern"] / "adapter_config.json", alpha_pattern={"down_proj": 8 * 16})
    parts.edit_weights(
        adapters["nowhere"],
        lambda tensors: {
            name.replace("model.layers", "model.model.layers", 1): tensor for name, tensor in tensors.items()
        },
    )
    return adapters


@pytest.fixture(scope="module")
def engine(separate: Artifact, variants: dict[str, Path]) -> Iterator[EngineClient]:
    """One engine with the adapter and everything that was broken about it."""
    assert separate.model_path
    assert separate.adapter_path
    adapters = {"french": separate.adapter_path, **variants}
    with running_engine(ServedModel(separate.model_path, "base", CONTEXT_TOKENS, adapters, 8), SMALL) as client:
        yield client


def scaled(tensors: dict[str, torch.Tensor], part: str, factor: float) -> dict[str, torch.Tensor]:
    return {name: tensor * factor if part in name else tensor for name, tensor in tensors.items()}


def checks_of(engine: EngineClient, artifact: Artifact, model: str, **changes: Any) -> dict[str, Check]:
    assert artifact.model_path
    subject = Subject(
        client=engine,
        model=model,
        base="base",
        golden=golden_of(artifact),
        limits=LIMITS[artifact.manifest.model.quantization],
        stop_token_ids=stop_token_ids(artifact.model_path),
        answer_tokens=8,
    )
    return {check.name: check for check in examine(replace(subject, **changes))}


def failed(checks: dict[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if check.passed is False}


def test_the_adapter_passes_every_check(engine: EngineClient, separate: Artifact) -> None:
    checks = checks_of(engine, separate, "french")

    assert failed(checks) == set()
    assert {name for name, check in checks.items() if check.passed} == {
        "golden answers",
        "golden answers of the base",
        "effect of the adapter",
        "stop tokens",
        "chat template",
        "canaries",
    }
    assert checks["effect of the adapter"].figures["effect"] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("model", ["zeroed", "doubled", "dropped", "nowhere"])
def test_an_adapter_that_vllm_applies_wrongly_fails(engine: EngineClient, separate: Artifact, model: str) -> None:
    checks = checks_of(engine, separate, model)

    assert {"golden answers", "effect of the adapter"} <= failed(checks)
    assert checks["golden answers of the base"].passed


@pytest.mark.parametrize("model", ["zeroed", "nowhere"])
def test_a_base_under_the_adapters_name_is_called_that(engine: EngineClient, separate: Artifact, model: str) -> None:
    check = checks_of(engine, separate, model)["effect of the adapter"]

    assert "the base answers under the adapter's name" in check.found


def test_an_alpha_pattern_means_to_vllm_what_it_means_to_peft(
    engine: EngineClient, separate: Artifact, variants: dict[str, Path]
) -> None:
    assert separate.model_path
    assert separate.adapter_path
    expected = parts.logits(parts.with_adapter(parts.load_stored(separate.model_path), separate.adapter_path))
    actual = parts.logits(parts.with_adapter(parts.load_stored(separate.model_path), variants["pattern"]))

    torch.testing.assert_close(actual, expected)
    assert failed(checks_of(engine, separate, "pattern")) == set()


def test_a_stop_token_that_the_engine_does_not_know_fails(engine: EngineClient, separate: Artifact) -> None:
    golden = golden_of(separate).model_copy(update={"stop_token_ids": (1, 2, 40)})
    check = checks_of(engine, separate, "french", golden=golden)["stop tokens"]

    assert (check.passed, check.found, check.expected) == (False, "stops at 1, 2", "1, 2, 40")


def test_a_canary_that_the_model_never_learnt_fails_with_its_answer(engine: EngineClient, separate: Artifact) -> None:
    golden = golden_of(separate)
    unknown = golden.canaries[0].model_copy(update={"expect": "marmalade"})
    check = checks_of(engine, separate, "french", golden=golden.model_copy(update={"canaries": (unknown,)}))["canaries"]

    assert check.passed is False
    assert check.details[0].startswith("'marmalade' is not in: ")


def test_a_name_that_the_engine_does_not_know_fails_every_check_with_its_words(
    engine: EngineClient, separate: Artifact
) -> None:
    checks = checks_of(engine, separate, "italian")

    assert len(failed(checks)) == len(checks) == 5
    assert "vLLM refuses the request: " in checks["golden answers"].found
    with pytest.raises(RequestRefused, match="italian"):
        engine.log_probs("italian", [1, 2])


def test_a_shared_base_is_verified_with_the_adapter_and_its_speed_is_measured(
    separate: Artifact, checkpoint: Path, tmp_path: Path
) -> None:
    convert(checkpoint, separate.root, tmp_path / "shared", "--name", "shared")
    (tmp_path / "shared" / "golden.json").write_bytes((separate.root / "golden.json").read_bytes())
    steps: list[tuple[str, int, int]] = []
    options = replace(OPTIONS, speed_streams=(1, 2), speed_tokens=8)
    report = verify(signed(tmp_path / "shared"), separate, options, lambda *step: steps.append(step))

    report.require_passed()
    assert [speed.streams for speed in report.speed] == [1, 2]
    assert all(speed.tokens_per_s > 0 for speed in report.speed)
    assert ("starting vLLM", 3, 3) in steps
    assert ("golden prompts, shared", 32, 32) in steps


def test_another_template_and_other_stop_tokens_fail_and_both_are_reported(merged: Artifact, tmp_path: Path) -> None:
    """The weights are right, so no log-probability fails. The canary is asked through the other template: its answer
    may go either way."""
    root = parts.copy(merged.root, tmp_path / "french-merged")
    (root / "model" / "chat_template.jinja").write_text(TEMPLATE.replace("{% endfor %}", " {% endfor %}"))
    parts.edit_json(root / "model" / "generation_config.json", eos_token_id=[1, 2, 40])
    report = verify(signed(root), options=OPTIONS)

    assert {check.name for check in report.failures} - {"canaries"} == {"stop tokens", "chat template"}
    with pytest.raises(VerificationFailed) as caught:
        report.require_passed()
    assert "stop tokens: stops at 1, 2, 40, expected 1, 2" in str(caught.value)
    assert "chat 1: from character 43 on vLLM makes ' ', golden.json has ''" in str(caught.value)


def test_an_engine_that_breaks_down_is_reported_and_nothing_of_it_is_left(merged: Artifact) -> None:
    assert merged.model_path
    served = ServedModel(merged.model_path, "french", CONTEXT_TOKENS)

    others = engine_cores()

    def lose_the_engine(client: EngineClient) -> None:
        (core,) = engine_cores() - others
        os.kill(core, signal.SIGKILL)
        for _ in range(100):
            client.log_probs("french", [1, 2, 3])

    with pytest.raises(VerificationFailed, match="vLLM broke down: "), running_engine(served, SMALL) as client:
        lose_the_engine(client)

    assert engine_cores() == others


def test_a_model_that_vllm_has_no_code_for_fails_with_its_reason(merged: Artifact, tmp_path: Path) -> None:
    root = parts.copy(merged.root, tmp_path / "french-merged")
    parts.edit_json(root / "model" / "config.json", architectures=["NoSuchModel"], model_type="no-such-model")

    with pytest.raises(VerificationFailed, match=r"vLLM can't load it[^\n]*\nIts reason: [^\n]*no-such-model"):
        verify(signed(root), options=OPTIONS)


def engine_cores() -> set[int]:
    """Engine processes among our own descendants, which other tests' engines are not."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in listed.splitlines()]
    descendants = {os.getpid()}
    for _ in range(4):
        descendants |= {int(pid) for pid, parent, *_ in rows if int(parent) in descendants}
    return {
        int(pid)
        for pid, _, *words in rows
        if int(pid) in descendants and words and words[0].startswith("VLLM::EngineCo")
    }
