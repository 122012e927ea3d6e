"""Against PyYAML's own loader, which differs in nothing but keys that are twice."""

from __future__ import annotations

import pytest
import yaml

from serve.settings.unique_yaml import load_yaml


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a: 1\nb: [x, {a: 2}]\n1: {a: 3}",
        "x: &x {p: 1, q: 2}\ny: &y {<<: *x, p: 3}\nz: {<<: *y, q: 4}",
        "z: {y: &y {<<: &x {p: 1}, p: 3}, w: {<<: *y, p: 5}}",
        "x: &x {p: 1}\ny: &y {q: 2}\nz: {<<: [*x, *y], r: 3}",
        "1: int\n'1': text",
    ],
)
def test_a_document_is_what_the_library_makes_of_it(text: str) -> None:
    assert load_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize("text", ["a: 1\na: 1", "x: [{a: 1, 'a': 2}]", "x: &x {p: 1}\ny: {<<: *x, p: 2, p: 3}"])
def test_a_key_that_is_twice_is_an_error_with_its_line(text: str) -> None:
    with pytest.raises(yaml.YAMLError, match=r"found the key '[ap]' twice\n.*line"):
        load_yaml(text)


def test_no_object_is_made() -> None:
    with pytest.raises(yaml.YAMLError, match="could not determine a constructor"):
        load_yaml("a: !!python/object/apply:os.system ['true']")
