from __future__ import annotations

import pytest

from convert.artifact import Canaries, Quality, Retention
from convert.quality import DEFAULT_GATE, Gate, choosing_gate

GOOD = Quality(
    reference="r",
    text="t",
    tokens=100,
    kl_mean=0.01,
    kl_p99=0.1,
    top1_agreement=0.98,
    gain_kept=0.97,
    kl_base=0.5,
    distance_kept=0.98,
    retention=Retention(mean=0.99, least=0.9, least_module="model.layers.3.mlp.up_proj"),
    canaries=Canaries(asked=2, passed=2),
)


def test_a_gate_lets_through_what_keeps_its_limits() -> None:
    assert Gate(max_kl=0.02, min_retention=0.9, min_gain=0.95).failures(GOOD) == ()
    assert Gate().failures(GOOD) == ()


def test_a_gate_lists_every_limit_that_is_not_kept_with_its_figure() -> None:
    bad = GOOD.model_copy(update={"canaries": Canaries(asked=3, passed=1)})

    failures = Gate(max_kl=0.001, min_retention=0.95, min_gain=0.99).failures(bad)

    assert len(failures) == 4
    for figure in ("0.010000", "--max-kl 0.001", "mlp.up_proj keeps 90.0%", "97.0%", "2 of 3 canaries"):
        assert figure in "\n".join(failures)


def test_a_canary_that_the_model_as_trained_fails_is_no_loss() -> None:
    def failures(passed: int) -> tuple[str, ...]:
        canaries = Canaries(asked=3, passed=passed, passed_as_trained=2)
        return Gate().failures(GOOD.model_copy(update={"canaries": canaries}))

    assert failures(2) == ()
    assert failures(1) == ("2 of 3 canaries were not answered with the expected text (the model as trained fails 1).",)


def test_canaries_may_fail_where_the_gate_does_not_ask_for_them() -> None:
    missed = GOOD.model_copy(update={"canaries": Canaries(asked=3, passed=1)})

    assert Gate(canaries=False).failures(missed) == ()


def test_a_gain_that_is_unknown_fails_a_limit_on_it_and_no_other() -> None:
    unknown = GOOD.model_copy(update={"gain_kept": None})

    assert Gate(max_kl=0.02).failures(unknown) == ()
    (failure,) = Gate(min_gain=0.5).failures(unknown)
    assert "can't be checked: on t the fine-tune predicts no better" in failure


def test_a_gain_that_is_unknown_passes_a_limit_that_the_user_did_not_set() -> None:
    assert DEFAULT_GATE.failures(GOOD.model_copy(update={"gain_kept": None})) == ()


def test_a_separate_adapter_keeps_its_delta_by_construction() -> None:
    assert Gate(min_retention=0.99).failures(GOOD.model_copy(update={"retention": None})) == ()


@pytest.mark.parametrize("limits", [Gate(), Gate(max_kl=0.05)], ids=["of Graft", "of the user"])
def test_a_choice_fails_what_is_nearly_as_far_from_the_fine_tune_as_its_base(limits: Gate) -> None:
    erased = GOOD.model_copy(update={"gain_kept": None, "kl_mean": 0.0044, "kl_base": 0.0047, "distance_kept": 0.064})

    (failure,) = choosing_gate(limits).failures(erased)

    assert "keeps 6.4% of what training changed, below 90%" in failure
    assert "0.0044 nats per token from the model as trained, the base alone 0.0047" in failure


def test_a_choice_fails_where_the_text_does_not_show_what_was_changed() -> None:
    unknown = GOOD.model_copy(update={"kl_base": 1e-9, "distance_kept": None})

    (failure,) = choosing_gate(Gate()).failures(unknown)

    assert "whether the result keeps it can't be told. Give text like that it was tuned on with --text" in failure


def test_a_single_variant_has_only_the_limits_of_the_user() -> None:
    assert Gate(max_kl=0.05).failures(GOOD.model_copy(update={"distance_kept": None})) == ()
