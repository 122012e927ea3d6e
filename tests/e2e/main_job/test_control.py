"""The adapters' life on two engines: staged, promoted, rolled back, pinned, refused; and nothing of it lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from convert.artifact import Golden, GoldenPrompt
from serve.follower.admin_client import AdminClient
from tests.convert import parts
from tests.e2e.conftest import REPLICAS, Server, Story
from tests.e2e.main_job.control import answer, held
from tests.e2e.main_job.test_answers import PROMPT


@pytest.fixture
def swiss(server: Server, story: Story, admin: AdminClient) -> Any:
    """A name of its own whose revisions are those of `german` and then `french`; retired at the end."""
    admin.publish(story.artifacts["german"], "swiss")
    admin.publish(story.artifacts["french"], "swiss")
    yield admin.show("swiss")
    for revision in admin.show("swiss")["pinned"]:
        admin.change("unpin", "swiss", revision.partition("@")[2])
    if admin.show("swiss")["current"]:
        admin.retire("swiss")


def test_a_rollback_moves_every_replica_back_without_a_load(server: Server, admin: AdminClient, swiss: Any) -> None:
    before = held(admin)

    moved = admin.roll_back("swiss", None, "it answers in French")

    assert moved["revision"] == swiss["previous"]
    assert moved["replicas"] == REPLICAS
    assert swiss["previous"] in before[0]
    for _ in range(2 * REPLICAS):
        response = answer(server, "swiss")
        assert response.json()["model"] == response.headers["x-graft-model"] == swiss["previous"]
    newest = admin.history("swiss", 1)[0]
    assert (newest["verb"], newest["reason"]) == ("rollback", "it answers in French")
    assert newest["by"].startswith("admin/")


def test_a_staged_revision_answers_by_its_revision_until_it_is_promoted(
    server: Server, story: Story, admin: AdminClient, swiss: Any
) -> None:
    staged = admin.publish(story.artifacts["french-2"], "swiss", stage_only=True)

    assert answer(server, "swiss").headers["x-graft-model"] == swiss["current"]
    assert answer(server, staged["revision"]).headers["x-graft-model"] == staged["revision"]
    promoted = server.command("promote", staged["revision"], "--json")

    assert json.loads(promoted.stdout)["revision"] == staged["revision"]
    assert answer(server, "swiss").headers["x-graft-model"] == staged["revision"]


def test_a_pinned_revision_stays_on_every_replica_and_is_not_retired(
    server: Server, story: Story, admin: AdminClient, swiss: Any
) -> None:
    pinned = server.command("pin", swiss["previous"])
    assert pinned.returncode == 0, pinned.stderr

    admin.publish(story.artifacts["french-2"], "swiss")  # without the pin the oldest revision would leave
    refused = server.command("retire", "swiss")

    assert all(swiss["previous"] in resident for resident in held(admin))
    assert "error[transition_refused]" in refused.stderr
    assert "is pinned" in refused.stderr


def refusal(admin: AdminClient, path: Path, name: str = "swiss") -> str:
    response = httpx.post(
        f"{admin.url}/admin/v1/adapters",
        json={"path": str(path), "name": name},
        headers={"authorization": f"Bearer {admin.token}"},
        timeout=300,
    )
    assert response.is_error, response.text
    error = response.json()["error"]
    return f"{error['code']}: {error['message']}"


@pytest.fixture
def plain(server: Server, story: Story) -> Any:
    """A plain PEFT adapter where callers may name it."""
    assert server.callers
    path = parts.copy(story.checkpoints["german"], server.callers / "plain")
    yield path
    shutil.rmtree(path)


def test_corrupt_and_malicious_adapters_are_refused_with_their_reasons(
    server: Server, story: Story, admin: AdminClient, plain: Path, tmp_path: Path
) -> None:
    assert server.callers
    before, epoch = admin.adapters(), admin.history(None, 1)[0]["epoch"]
    weights = plain / "adapter_model.safetensors"
    content = weights.read_bytes()

    assert refusal(admin, story.checkpoints["german"]).startswith("path_refused")
    (server.callers / "link").symlink_to(story.checkpoints["german"])
    assert refusal(admin, server.callers / "link").startswith("path_refused")
    assert refusal(admin, plain / ".." / ".." / "state").startswith("path_refused")
    (plain / "shadow").symlink_to("/etc/shadow")
    assert "symbolic link" in refusal(admin, plain)
    (plain / "shadow").unlink()
    weights.write_bytes(content[:-1])
    assert "is damaged" in refusal(admin, plain)
    weights.write_bytes((1 << 62).to_bytes(8, "little") + content[8:])
    assert "not a safetensors file" in refusal(admin, plain)
    weights.rename(plain / "adapter_model.bin")
    assert "pickled files can run code" in refusal(admin, plain)
    (plain / "adapter_model.bin").rename(weights)
    weights.write_bytes(content)
    parts.edit_weights(plain, lambda tensors: tensors | {next(iter(tensors)): next(iter(tensors.values())) * torch.nan})
    assert "not a number" in refusal(admin, plain)

    assert admin.adapters() == before
    assert admin.history(None, 1)[0]["epoch"] == epoch


def test_an_adapter_that_changes_nothing_fails_its_proof_on_the_engine_and_is_abandoned(
    admin: AdminClient, plain: Path
) -> None:
    parts.edit_weights(
        plain, lambda tensors: {name: tensor * (0 if "lora_B" in name else 1) for name, tensor in tensors.items()}
    )

    message = refusal(admin, plain, "idle")

    assert message.startswith("publish_failed")
    assert "changes nothing" in message
    revision = admin.show("idle")["revisions"][0]
    assert revision["state"] == "abandoned"
    assert "changes nothing" in revision["reason"]
    assert not any(name.startswith("idle@") for resident in held(admin) for name in resident)


@pytest.mark.parametrize("lie", [0.0, 2.0], ids=["true", "false"])
def test_golden_answers_are_asked_of_every_engine(
    server: Server, story: Story, admin: AdminClient, tmp_path: Path, lie: float
) -> None:
    model = parts.with_adapter(parts.dequantized_model(story.base), story.checkpoints["german"])
    logits = parts.logits(model, torch.tensor([PROMPT]))
    logprobs = logits[:-1].log_softmax(-1) if logits.ndim == 2 else logits[0, :-1].log_softmax(-1)
    true = tuple(float(logprobs[at, token]) for at, token in enumerate(PROMPT[1:]))
    golden = Golden(
        prompts=(GoldenPrompt(token_ids=tuple(PROMPT), reference=true, result=tuple(value - lie for value in true)),),
        chats=(), canaries=(), stop_token_ids=(),
    )  # fmt: skip
    artifact = with_golden(story.artifacts["german"], tmp_path / "golden", golden)

    published = server.command("publish", artifact, "--name", "golden")

    if lie:
        assert "error[publish_failed]" in published.stderr
        assert "answers otherwise here than when it was converted" in " ".join(published.stderr.split())
    else:
        assert published.returncode == 0, published.stderr
        admin.retire("golden")


def with_golden(artifact: Path, directory: Path, golden: Golden) -> Path:
    import hashlib

    shutil.copytree(artifact, directory)
    (directory / "golden.json").write_text(golden.model_dump_json())
    digest = hashlib.sha256((directory / "golden.json").read_bytes()).hexdigest()
    parts.edit_json(directory / "manifest.json", golden=digest)
    return directory


def test_what_drives_vllm_drives_this(server: Server, admin: AdminClient, plain: Path) -> None:
    headers = {"authorization": f"Bearer {admin.token}"}

    def call(route: str, **body: object) -> httpx.Response:
        return httpx.post(f"{server.url}/v1/{route}_lora_adapter", json=body, headers=headers, timeout=300)

    loaded = call("load", lora_name="tyrol", lora_path=str(plain))
    again = call("load", lora_name="tyrol", lora_path=str(plain))
    card = httpx.get(f"{server.url}/v1/models/tyrol").json()
    replaced = call("load", lora_name="tyrol", lora_path=str(plain), load_inplace=True)
    completion = answer(server, "tyrol")
    unloaded = call("unload", lora_name="tyrol")

    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'tyrol' added successfully.")
    assert again.status_code == 400
    assert "has already been loaded" in again.json()["error"]["message"]
    assert (card["id"], card["parent"]) == ("tyrol", "tiny-llama")
    assert replaced.status_code == completion.status_code == 200
    assert (unloaded.status_code, unloaded.text) == (200, "Success: LoRA adapter 'tyrol' removed successfully.")
    missing = call("unload", lora_name="tyrol")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "NotFoundError")


def test_a_file_says_what_there_shall_be(server: Server, story: Story, admin: AdminClient, tmp_path: Path) -> None:
    file = tmp_path / "adapters.yaml"
    file.write_text(f"adapters:\n  - {{artifact: {story.artifacts['german']}, name: tyrol, pinned: true}}\n")

    planned = json.loads(server.command("apply", file, "--dry-run", "--json").stdout)["steps"]
    assert admin.history("tyrol", 1)[0]["verb"] == "retire"
    applied = json.loads(server.command("apply", file, "--json").stdout)
    again = json.loads(server.command("apply", file, "--json").stdout)

    assert planned == applied["steps"]
    assert [step.split("@")[0] for step in planned] == ["publish tyrol", "pin tyrol"]
    assert (applied["failed"], again["steps"]) == ([], [])
    assert admin.show("tyrol")["pinned"] == [admin.show("tyrol")["current"]]
    admin.change("unpin", "tyrol", None)
    admin.retire("tyrol")
