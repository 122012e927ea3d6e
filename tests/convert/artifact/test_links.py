"""Links in a checkpoint or base: what leads out of the directory is neither read nor published."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from convert.artifact.links import is_contained
from convert.errors import BaseUnreadable, CheckpointUnreadable
from convert.inputs import trainer_files
from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel
from tests.convert import parts
from tests.convert.asking import Request, convert


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "id_ed25519"
    path.write_text("a private key")
    return path


def in_hub_cache(source: Path, cache: Path, repository: str) -> Path:
    """The snapshot of a repository, as huggingface_hub keeps it."""
    blobs, snapshot = cache / repository / "blobs", cache / repository / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    for path in source.rglob("*"):
        if path.is_file():
            blob = blobs / f"{len(list(blobs.iterdir())):040x}"
            link = snapshot / path.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, blob)
            link.symlink_to(Path(*[".."] * len(link.relative_to(blobs.parent).parts[:-1])) / "blobs" / blob.name)
    return snapshot


@pytest.mark.parametrize(
    "file", ["chat_template.jinja", "tokenizer.json", "adapter_config.json", "adapter_model.safetensors"]
)
def test_a_link_out_of_a_checkpoint_is_refused(unmarked: Path, tmp_path: Path, secret: Path, file: str) -> None:
    checkpoint = parts.copy(unmarked, tmp_path / "checkpoint")
    (checkpoint / file).unlink(missing_ok=True)
    (checkpoint / file).symlink_to(secret)

    with pytest.raises(CheckpointUnreadable, match=f"{file} is a symbolic link to a file outside") as refused:
        Checkpoint.open(checkpoint)

    assert "private" not in str(refused.value)


@pytest.mark.parametrize("linked", ["file", "directory"])
def test_a_chat_template_of_another_use_that_lies_elsewhere_is_refused(
    unmarked: Path, tmp_path: Path, secret: Path, linked: str
) -> None:
    checkpoint = parts.copy(unmarked, tmp_path / "checkpoint")
    templates = checkpoint / "additional_chat_templates"
    if linked == "directory":
        secret.rename(tmp_path / "key.jinja")
        templates.symlink_to(tmp_path)
    else:
        templates.mkdir()
        (templates / "key.jinja").symlink_to(secret)

    with pytest.raises(CheckpointUnreadable, match="is a symbolic link to a file outside"):
        Checkpoint.open(checkpoint)


@pytest.mark.parametrize("file", ["generation_config.json", "chat_template.jinja", "model.safetensors"])
def test_a_link_out_of_a_base_is_refused(base: Path, tmp_path: Path, secret: Path, file: str) -> None:
    directory = parts.copy(base, tmp_path / "base")
    (directory / file).unlink(missing_ok=True)
    (directory / file).symlink_to(secret)

    with pytest.raises(BaseUnreadable, match=f"{file} is a symbolic link to a file outside"):
        BaseModel.open(directory)


def test_a_checkpoint_and_a_base_in_a_hub_cache_are_converted(lora: Path, base: Path, tmp_path: Path) -> None:
    cache = tmp_path / "real" / "hub"
    cached_base = in_hub_cache(base, cache, "models--acme--tiny-llama")
    run = tmp_path / "run"
    parts.copy(lora, run / "checkpoint-10")
    parts.save_tokenizer(run / "checkpoint-10")
    (run / "checkpoint-10" / "additional_chat_templates").mkdir()
    (run / "checkpoint-10" / "additional_chat_templates" / "tools.jinja").write_text(parts.TEMPLATE)
    cached_run = in_hub_cache(run, cache, "models--acme--run")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    adapter = tmp_path / "link" / "hub" / cached_run.relative_to(cache) / "checkpoint-10"

    artifact = convert(Request(adapter, cached_base, tmp_path / "tiny", measure=False, route="merge"))

    artifact.verify()
    assert (artifact.root / "model" / "tokenizer.json").is_file()
    assert not [path for path in artifact.root.rglob("*") if path.is_symlink()]


@pytest.mark.parametrize("lies_in", ["blob", "blobs", "another repository"])
def test_what_only_looks_like_a_hub_cache_leads_nowhere(tmp_path: Path, secret: Path, lies_in: str) -> None:
    repository = tmp_path / "cache" / "models--acme--tiny"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "cache" / "models--acme--private" / "blobs" if "another" in lies_in else repository / "blobs"
    if lies_in == "blobs":
        blobs.symlink_to(secret.parent)
    else:
        blobs.mkdir(parents=True)
        blob = blobs / secret.name
        shutil.copy(secret, blob) if "another" in lies_in else blob.symlink_to(secret)
    (snapshot / "chat_template.jinja").symlink_to(blobs / secret.name)

    assert (snapshot / "chat_template.jinja").read_text() == "a private key"
    assert not is_contained(snapshot / "chat_template.jinja")


def test_a_link_within_the_directory_is_followed(unmarked: Path, tmp_path: Path) -> None:
    """As Kubernetes mounts files."""
    checkpoint = tmp_path / "checkpoint"
    parts.copy(unmarked, checkpoint / "..2026")
    (checkpoint / "..data").symlink_to("..2026")
    for path in (checkpoint / "..2026").iterdir():
        (checkpoint / path.name).symlink_to(Path("..data") / path.name)

    assert Checkpoint.open(checkpoint).lora_weights


def test_a_linked_directory_of_the_adapter_is_not_taken_for_the_checkpoint(unmarked: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "default").symlink_to(unmarked)

    with pytest.raises(CheckpointUnreadable):
        Checkpoint.open(tmp_path / "checkpoint")


def test_a_linked_file_of_a_run_proves_nothing(tmp_path: Path) -> None:
    (tmp_path / "elsewhere.json").write_text('{"quantization_bit": 4}')
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.json").symlink_to(tmp_path / "elsewhere.json")

    assert trainer_files.read_text(tmp_path / "run" / "args.json") == ""
    assert trainer_files.read_json_object(tmp_path / "run" / "args.json") == {}


READ_FROM_CHECKPOINT = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer.json",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/tools.jinja",
    "args.json",
    "README.md",
]
READ_FROM_BASE = [
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.json",
    "additional_chat_templates/tools.jinja",
]


@pytest.mark.parametrize("target", ["/nowhere/at/all", "itself"])
@pytest.mark.parametrize(
    ("of", "file"),
    [("checkpoint", file) for file in READ_FROM_CHECKPOINT] + [("base", file) for file in READ_FROM_BASE],
)
def test_a_link_that_leads_to_nothing_is_told_as_such(
    unmarked: Path, base: Path, tmp_path: Path, of: str, file: str, target: str
) -> None:
    directory = parts.copy(unmarked if of == "checkpoint" else base, tmp_path / of)
    path = directory / file
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(path.name if target == "itself" else target)

    with pytest.raises((CheckpointUnreadable, BaseUnreadable), match=f"{file} is a dangling link: it leads to "):
        Checkpoint.open(directory) if of == "checkpoint" else BaseModel.open(directory)


def test_a_link_that_leads_to_nothing_is_left_alone_where_nothing_reads_it(unmarked: Path, tmp_path: Path) -> None:
    checkpoint = parts.copy(unmarked, tmp_path / "checkpoint")
    (checkpoint / "optimizer.pt").symlink_to("/scratch/of/a/cluster/optimizer.pt")

    assert Checkpoint.open(checkpoint).problems == ()


def test_a_link_to_a_directory_that_is_gone_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "base").symlink_to(tmp_path / "gone")

    with pytest.raises(BaseUnreadable, match=f"base is a dangling link: it leads to {tmp_path / 'gone'}"):
        BaseModel.open(tmp_path / "base")
    with pytest.raises(CheckpointUnreadable, match="base is a dangling link"):
        Checkpoint.open(tmp_path / "base")
