from __future__ import annotations

import pytest

from serve.names import AdapterRevision, RequestedModel

REVISION = "0123456789abcdef" * 4


def test_engine_name_carries_the_revision() -> None:
    assert AdapterRevision("pirate", REVISION).engine_name == "pirate@0123456789ab"


def test_two_revisions_of_one_name_never_share_an_engine_name() -> None:
    assert AdapterRevision("pirate", "a" * 64).engine_name != AdapterRevision("pirate", "b" * 64).engine_name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("pirate", RequestedModel("pirate"), id="alias"),
        pytest.param("pirate@0123456789ab", RequestedModel("pirate", "0123456789ab"), id="pinned"),
        pytest.param("pirate@", RequestedModel("pirate", ""), id="empty-revision-is-not-the-alias"),
        pytest.param("a@b@c", RequestedModel("a", "b@c"), id="too-many-separators"),
        pytest.param("", RequestedModel(""), id="empty"),
    ],
)
def test_requested_model_is_split_once(text: str, expected: RequestedModel) -> None:
    assert RequestedModel.parse(text) == expected
