"""Settings in YAML are read as trainers write them; hostile or broken YAML proves nothing."""

from __future__ import annotations

import pytest

from convert.inputs.trainer_files import yaml_scalars


def test_scalars_have_their_types() -> None:
    text = "bits: 4\ndouble: true\nbase: acme/tiny # a comment\nmethod: null\nquoted: '4'\nunset:\n"

    assert yaml_scalars(text) == {
        "bits": 4,
        "double": True,
        "base": "acme/tiny",
        "method": None,
        "quoted": "4",
        "unset": None,
    }


def test_the_list_in_a_model_card_of_peft_is_one_set_of_settings() -> None:
    text = "- load_in_4bit: True\n- llm_int8_skip_modules: None\n- bnb_4bit_quant_type: nf4\n"

    assert yaml_scalars(text) == {"load_in_4bit": True, "llm_int8_skip_modules": None, "bnb_4bit_quant_type": "nf4"}


def test_nested_settings_are_left_out() -> None:
    assert yaml_scalars("adapter: qlora\ndatasets:\n- path: x\n  load_in_4bit: true\n") == {"adapter": "qlora"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a: [",
        "just words",
        "[" * 10_000,
        "a: !!python/object/apply:os.system ['exit 1']",
        "a: !!bool x",
        "a: !!timestamp x",
        "a: " + "9" * 10_000,
        "a: 1\n" * 100_000,
    ],
    ids=lambda text: text[:20],
)
def test_broken_and_hostile_files_prove_nothing(text: str) -> None:
    assert yaml_scalars(text) == {}


def test_merge_keys_are_ignored() -> None:
    """Thirty levels of ten merges each would make 10**30 pairs."""
    levels = ["a0: &a0 {x: 1}"] + [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 30)]

    assert yaml_scalars("\n".join([*levels, "load_in_4bit: true"])) == {"load_in_4bit": True}
