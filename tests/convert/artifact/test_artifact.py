"""The contract between the two packages: what a manifest may say, and what verification finds."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, Field, ValidationError
from typer.testing import CliRunner

from convert.artifact import MANIFEST, Artifact, digest, file_digests, problems_of
from convert.cli.app import app
from convert.errors import ArtifactInvalid
from tests.convert.asking import Request, convert


@pytest.fixture
def artifact(qlora: Path, base: Path, tmp_path: Path) -> Artifact:
    return convert(Request(checkpoint=qlora, base=base, destination=tmp_path / "tiny", name="tiny"))


def edit(artifact: Artifact, change: Callable[[dict[str, Any]], None]) -> None:
    path = artifact.root / MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_the_digest_of_a_directory_is_what_sha256sum_says(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two").write_text("2")
    (tmp_path / "one").write_text("1")

    # printf '1' | sha256sum and printf '2' | sha256sum; then sha256sum of the two lines `<sha256>  <path>`.
    files = file_digests(tmp_path)
    assert files == {
        "b/two": "d4735e3a265e16eee03f59718b9b5d03019c07d8b6c51f90da3a666eec13ab35",
        "one": "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b",
    }
    assert digest(files) == "dc93cc2ccb6896ee0e01b93b52b687ecd83b8e0563f644dcd1a0195f14cf26f5"


@pytest.mark.parametrize(
    ("part", "identity", "message"),
    [
        ("model", "fingerprint", "the model's fingerprint is not the digest of its files"),
        ("adapter", "revision", "the adapter's revision is not the digest of its files"),
    ],
)
def test_an_identity_that_is_not_the_digest_of_the_files_is_found(
    artifact: Artifact, part: str, identity: str, message: str
) -> None:
    edit(artifact, lambda manifest: manifest[part].update({identity: "0" * 64}))

    with pytest.raises(ArtifactInvalid, match=message):
        Artifact.open(artifact.root).verify()


def test_all_added_and_removed_files_are_reported(artifact: Artifact) -> None:
    (artifact.root / "model" / "extra.json").write_text("{}")
    (artifact.root / "adapter" / "adapter_config.json").unlink()

    with pytest.raises(ArtifactInvalid, match=r"extra\.json is not in the manifest.*adapter_config\.json is missing"):
        artifact.verify()


def test_changed_golden_answers_and_checkpoints_are_found(artifact: Artifact) -> None:
    """A signature covers the digest of golden.json in the manifest, which must be that of the file."""
    golden, checkpoint = artifact.root / "golden.json", artifact.root / "checkpoint"
    assert artifact.manifest.golden
    artifact.verify()

    golden.write_bytes(golden.read_bytes() + b" ")
    with pytest.raises(ArtifactInvalid, match=r"golden\.json has other bytes"):
        artifact.verify()
    golden.unlink()
    with pytest.raises(ArtifactInvalid, match=r"golden\.json is missing"):
        artifact.verify()
    checkpoint.mkdir()
    with pytest.raises(ArtifactInvalid, match="checkpoint/ is not in the manifest"):
        artifact.verify()
    edit(artifact, lambda manifest: manifest.update(golden=None, checkpoint={"a": "0" * 64}))
    golden.write_text("{}")
    with pytest.raises(ArtifactInvalid, match=r"checkpoint/a is missing; golden\.json is not in the manifest"):
        Artifact.open(artifact.root).verify()


def test_nothing_changed_is_signed(artifact: Artifact, tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", key], check=True, capture_output=True)
    golden = artifact.root / "golden.json"
    golden.write_bytes(golden.read_bytes() + b" ")

    result = CliRunner().invoke(app, ["sign", str(artifact.root), "--key", str(key)])

    assert result.exit_code == 4
    assert "golden.json has other bytes" in " ".join(result.stderr.split())
    assert not (artifact.root / "manifest.sig").exists()


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", ".hidden", "a/../../b", "a\\b", ""])
def test_a_manifest_cannot_name_a_file_outside_its_directory(artifact: Artifact, path: str) -> None:
    edit(artifact, lambda manifest: manifest["model"]["files"].update({path: "0" * 64}))

    with pytest.raises(ArtifactInvalid, match="does not follow"):
        Artifact.open(artifact.root)


@pytest.mark.parametrize("name", ["", "UPPER", "a@b", "a/b", "-a", "a" * 65, "ü"])
def test_a_manifest_cannot_have_an_invalid_name(artifact: Artifact, name: str) -> None:
    edit(artifact, lambda manifest: manifest.update(name=name))

    with pytest.raises(ArtifactInvalid, match="name: "):
        Artifact.open(artifact.root)


@pytest.mark.parametrize("change", [{"schema": "graft.artifact/2"}, {"surprise": 1}, {"route": None}])
def test_another_format_of_manifest_is_refused(artifact: Artifact, change: dict[str, Any]) -> None:
    edit(artifact, lambda manifest: manifest.update(change))

    with pytest.raises(ArtifactInvalid, match=next(iter(change))):
        Artifact.open(artifact.root)


def test_what_is_wrong_with_a_file_is_told_without_the_words_of_python() -> None:
    class Part(BaseModel):
        name: str

    class File(BaseModel):
        adapters: tuple[Part, ...]
        names: Annotated[frozenset[str], Field(min_length=2)]
        versions: Mapping[str, str]
        labels: dict[str, str]
        root: Path
        nothing: None
        pair: Annotated[tuple[int, ...], Field(min_length=1)] = (1,)
        part: Part

    wrong = {"adapters": 5, "names": ["a"], "versions": 5, "labels": [], "root": 5, "nothing": 5, "pair": [], "part": 5}
    with pytest.raises(ValidationError) as caught:
        File.model_validate(wrong)
    with pytest.raises(ValidationError) as of_all:
        File.model_validate([])

    said = problems_of(caught.value)
    for place, reason in {
        "adapters": "Input should be a valid list",
        "names": "List should have at least 2 items",
        "versions": "Input should be an object of names and values",
        "labels": "Input should be an object of names and values",
        "root": "Input should be a path",
        "nothing": "Input should be null",
        "pair": "List should have at least 1 item",
        "part": "Input should be an object of names and values",
    }.items():
        assert f"{place}: {reason}" in said
    assert problems_of(of_all.value) == "Input should be an object of names and values"
    assert not re.search("tuple|frozenset|dictionary|mapping|None|instance|class", said, re.IGNORECASE)
