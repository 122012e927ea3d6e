from __future__ import annotations

from pathlib import Path

import pytest

from serve.deployment.pools.bundle import bundles_of
from serve.errors import ArtifactRefused
from serve.settings import supported_rank
from tests.serve.conftest import MakeArtifact


def test_adapters_share_the_base_that_one_of_them_holds(make_artifact: MakeArtifact) -> None:
    pirate = make_artifact("pirate")
    ticket = make_artifact("ticket", name="ticket", weights="ticket weights", holds_base=False, rank=20)

    (bundle,) = bundles_of([ticket.root, pirate.root])

    assert bundle.model_path == pirate.model_path
    assert bundle.model_name == "small-llama"
    assert [candidate.name for candidate, _ in bundle.adapters] == ["ticket", "pirate"]
    assert bundle.max_lora_rank == 32


def test_a_merged_model_is_served_under_its_own_name_without_adapters(make_artifact: MakeArtifact) -> None:
    (bundle,) = bundles_of([make_artifact("merged", name="tickets-4bit", weights=None).root])

    assert (bundle.model_name, bundle.adapters, bundle.max_lora_rank) == ("tickets-4bit", (), 0)


def test_artifacts_for_different_bases_make_a_bundle_each_in_their_order(make_artifact: MakeArtifact) -> None:
    pirate = make_artifact("a")
    merged = make_artifact("b", name="tickets-4bit", weights=None, base="merged weights")
    ticket = make_artifact("c", name="ticket", weights="ticket weights", holds_base=False)

    first, second = bundles_of([pirate.root, merged.root, ticket.root])

    assert (first.model_name, [candidate.name for candidate, _ in first.adapters]) == (
        "small-llama", ["pirate", "ticket"],
    )  # fmt: skip
    assert (second.model_name, second.model_path, second.adapters) == ("tickets-4bit", merged.model_path, ())


def test_two_base_models_of_one_source_need_a_name_for_one_of_them(make_artifact: MakeArtifact) -> None:
    roots = [make_artifact("a").root, make_artifact("b", name="other", base="the same in 16 bits").root]

    with pytest.raises(
        ArtifactRefused, match=r"Two base models have the name 'small-llama',.*--base-name ARTIFACT=NAME"
    ):
        bundles_of(roots)
    with pytest.raises(ArtifactRefused, match="can't name all base models"):
        bundles_of(roots, {None: "small"})
    with pytest.raises(ArtifactRefused, match="is none of the artifacts"):
        bundles_of(roots, {roots[0].parent: "small"})
    assert [bundle.model_name for bundle in bundles_of(roots, {roots[1]: "small-16"})] == ["small-llama", "small-16"]


@pytest.mark.parametrize(
    ("other", "taken"),
    [({"weights": "x"}, "pirate"), ({"name": "small-llama", "weights": "x"}, "small-llama"),
     ({"name": "pirate", "weights": None}, "pirate")],
    ids=["two adapters", "an adapter and a base model", "a merged model and an adapter"],
)  # fmt: skip
def test_a_name_is_unique_over_all_pools(make_artifact: MakeArtifact, other: dict[str, str], taken: str) -> None:
    second = make_artifact("b", base="another base", source="some-org/Other", **other)

    with pytest.raises(ArtifactRefused, match=f"the name '{taken}' is taken already"):
        bundles_of([make_artifact("a").root, second.root])


def test_artifacts_that_only_refer_to_their_base_are_refused(make_artifact: MakeArtifact) -> None:
    with pytest.raises(ArtifactRefused, match="None of the artifacts holds the base model"):
        bundles_of([make_artifact("a", holds_base=False).root])


def test_two_adapters_of_one_name_are_refused(make_artifact: MakeArtifact) -> None:
    with pytest.raises(ArtifactRefused, match="'pirate' is taken"):
        bundles_of([make_artifact("a").root, make_artifact("b", weights="other").root])


def test_a_rank_that_vllm_cannot_serve_is_refused(make_artifact: MakeArtifact) -> None:
    with pytest.raises(ArtifactRefused, match="rank 513 is above 512"):
        bundles_of([make_artifact("a", rank=513).root])


def test_changed_bytes_are_refused(make_artifact: MakeArtifact) -> None:
    artifact = make_artifact("a")
    (artifact.root / "adapter" / "adapter_config.json").write_text("tampered")

    with pytest.raises(ArtifactRefused, match=r"adapter/adapter_config\.json has other bytes"):
        bundles_of([artifact.root])


def test_a_directory_that_is_no_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactRefused, match=r"no manifest\.json"):
        bundles_of([tmp_path])


@pytest.mark.parametrize(("rank", "expected"), [(1, 1), (2, 8), (16, 16), (17, 32), (512, 512)])
def test_max_lora_rank_is_rounded_up_to_what_vllm_has(rank: int, expected: int) -> None:
    assert supported_rank(rank) == expected


def test_a_rank_above_all_is_refused() -> None:
    with pytest.raises(ValueError, match="512"):
        supported_rank(513)
