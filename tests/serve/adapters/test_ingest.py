from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import TypeAdapter
from transformers import AutoTokenizer
from transformers.processing_utils import ProcessorMixin

from convert.artifact.chat_templates import chat_templates
from convert.artifact.signature import sign
from convert.errors import ConvertError
from serve.adapters.admission import Admission
from serve.adapters.ingest import ingest_artifact, ingest_path
from serve.catalogue.adapter_store import AdapterStore
from serve.catalogue.candidate import Candidate
from serve.catalogue.storage.object_store import DirectoryStore
from serve.errors import AdapterRejected, ArtifactRefused, PathRefused, StoreUnavailable
from serve.settings import AdmissionSettings, EngineSettings
from tests.convert import parts
from tests.convert.artifact.test_signature import make_key
from tests.serve.conftest import BASE, MakeArtifact, write_adapter, write_base


class Desk:
    """A server that takes adapters from one directory."""

    def __init__(self, home: Path) -> None:
        self.roots = home / "roots"
        self.roots.mkdir()
        write_base(home / "base", "base")
        self.base = home / "base"
        self.engine = EngineSettings(model_path=self.base, model_name="small", fingerprint=BASE, max_lora_rank=16)
        self.store = AdapterStore(home / "store", DirectoryStore(home / "state"))
        self.settings = AdmissionSettings(adapter_roots=(self.roots,))

    def take(self, path: Path, name: str | None = None, **settings: object) -> object:
        return ingest_path(path, name, self.store, lambda: self.engine, self.settings.model_copy(update=settings))


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_a_plain_adapter_below_a_root_gets_the_digest_of_its_files(desk: Desk) -> None:
    candidate = desk.take(write_adapter(desk.roots / "pirate", "pirate"))

    assert (candidate.name, candidate.rank, candidate.base) == ("pirate", 2, BASE)  # type: ignore[attr-defined]
    assert sorted(file.name for file in desk.store.path(candidate.adapter).iterdir()) == [  # type: ignore[attr-defined]
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip


def test_an_artifact_below_a_root_keeps_its_lineage(desk: Desk, make_artifact: MakeArtifact, tmp_path: Path) -> None:
    make_artifact("roots/a")

    candidate = desk.take(desk.roots / "a", "corsair")

    assert candidate.name == "corsair"  # type: ignore[attr-defined]
    assert candidate.lineage.training == "qlora"  # type: ignore[attr-defined]


def test_no_path_is_taken_where_no_root_is_set(desk: Desk) -> None:
    path = write_adapter(desk.roots / "pirate", "pirate")

    with pytest.raises(PathRefused, match="--adapter-root"):
        desk.take(path, adapter_roots=())


@pytest.mark.parametrize("path", ["/etc", "roots/../outside", "roots/link", "roots/link/deeper", "relative"])
def test_a_path_that_leads_out_of_the_roots_is_refused(desk: Desk, tmp_path: Path, path: str) -> None:
    write_adapter(tmp_path / "outside", "pirate")
    write_adapter(tmp_path / "outside" / "deeper", "pirate")
    (desk.roots / "link").symlink_to(tmp_path / "outside")

    with pytest.raises(PathRefused, match="not below a directory"):
        desk.take(Path(path) if path == "relative" else tmp_path / path)


@pytest.mark.parametrize("name", ["pirate\0", "x" * 5000, "x/" * 3000], ids=["null", "long", "deep"])
def test_what_is_no_path_at_all_is_refused(desk: Desk, name: str) -> None:
    with pytest.raises(PathRefused, match="is no path: "):
        desk.take(desk.roots / name)


def test_a_symbolic_link_inside_an_adapter_is_refused_wherever_it_leads(desk: Desk) -> None:
    path = write_adapter(desk.roots / "pirate", "pirate")
    other = write_adapter(desk.roots / "other", "other")
    (path / "adapter_config.json").unlink()
    (path / "adapter_config.json").symlink_to(other / "adapter_config.json")

    with pytest.raises(PathRefused, match="symbolic link"):
        desk.take(path)


def test_a_file_that_becomes_a_symbolic_link_while_it_is_taken_is_not_followed(
    desk: Desk, make_artifact: MakeArtifact
) -> None:
    artifact = make_artifact("a")
    config = artifact.root / "adapter" / "adapter_config.json"
    config.rename(artifact.root / "elsewhere.json")
    config.symlink_to(artifact.root / "elsewhere.json")

    with pytest.raises(StoreUnavailable):
        ingest_artifact(artifact, None, desk.store)


def test_a_pickled_adapter_is_refused_unread(desk: Desk) -> None:
    path = write_adapter(desk.roots / "pirate", "pirate")
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")

    with pytest.raises(AdapterRejected, match="pickled files can run code and are never read"):
        desk.take(path)


def test_a_directory_without_an_adapter_is_reported(desk: Desk) -> None:
    (desk.roots / "empty").mkdir()

    with pytest.raises(AdapterRejected, match=r"no adapter_config\.json, adapter_model\.safetensors"):
        desk.take(desk.roots / "empty")


def test_an_adapter_above_the_limit_is_refused(desk: Desk) -> None:
    with pytest.raises(AdapterRejected, match="max_adapter_bytes"):
        desk.take(write_adapter(desk.roots / "pirate", "pirate"), max_adapter_bytes=100)


@pytest.mark.parametrize("name", ["Pirate", "a@b", "../x", ""])
def test_a_name_that_is_none_is_refused(desk: Desk, name: str) -> None:
    path = write_adapter(desk.roots / "Pirate", "pirate")

    with pytest.raises(AdapterRejected, match="can't be a name"):
        desk.take(path, name)


def test_another_tokenizer_or_chat_template_than_the_bases_is_reported_unless_allowed(desk: Desk) -> None:
    (desk.base / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}, "padding": None}))
    (desk.base / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    path = write_adapter(desk.roots / "pirate", "pirate")
    (path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}, "padding": {"length": 8}}))
    (path / "chat_template.jinja").write_text("{{ messages }}\n")
    desk.take(path)

    (path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"b": 0}}}))
    (path / "chat_template.jinja").write_text("{{ other }}")

    with pytest.raises(AdapterRejected, match="another tokenizer and another chat template"):
        desk.take(path)
    desk.take(path, allow_other_template=True)


def test_golden_answers_are_taken_along_and_must_be_the_ones_of_the_manifest(
    desk: Desk, make_artifact: MakeArtifact
) -> None:
    artifact = make_artifact("a", golden="{}")
    candidate = ingest_artifact(artifact, None, desk.store)
    assert candidate.golden
    assert desk.store.golden(candidate.golden) == b"{}"

    (artifact.root / "golden.json").write_text("{ }")
    with pytest.raises(ArtifactRefused, match=r"golden\.json is not the one"):
        ingest_artifact(artifact, None, desk.store)
    (artifact.root / "golden.json").unlink()
    with pytest.raises(ArtifactRefused, match="missing"):
        ingest_artifact(artifact, None, desk.store)


def test_where_keys_are_trusted_only_what_one_of_them_signed_gets_in(
    desk: Desk, make_artifact: MakeArtifact, tmp_path: Path
) -> None:
    artifact = make_artifact("roots/a")
    private, public = make_key(tmp_path)
    unsigned = desk.take(desk.roots / "a")
    engine = desk.engine.model_copy(update={"fingerprint": unsigned.base})  # type: ignore[attr-defined]
    admission = Admission(lambda: [engine], desk.settings.model_copy(update={"trusted_keys": (public,)}))
    files = desk.store.path(unsigned.adapter)  # type: ignore[attr-defined]

    with pytest.raises(AdapterRejected, match="is not signed by a key"):
        admission.check(unsigned, files)  # type: ignore[arg-type]

    sign(artifact, private)
    admission.check(desk.take(desk.roots / "a"), files)  # type: ignore[arg-type]
    admission.check(desk.take(desk.roots / "a", "corsair"), files)  # type: ignore[arg-type]


def test_a_file_that_is_far_too_long_for_a_signature_is_none_and_stays_out_of_the_catalogue(
    desk: Desk, make_artifact: MakeArtifact
) -> None:
    artifact = make_artifact("roots/a")
    (artifact.root / "manifest.sig").write_text("A" * 5000)

    candidate = desk.take(desk.roots / "a")

    stored = TypeAdapter(Candidate)
    assert stored.validate_json(stored.dump_json(candidate)) == candidate  # type: ignore[arg-type]


TEMPLATE, TOOLS = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}", "{{ tools }}"
NAMED = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": TOOLS}]


def _in_files(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(TOOLS if "tool_use" in name else TEMPLATE)


def _inline(directory: Path, value: object) -> None:
    parts.edit_json(directory / "tokenizer_config.json", chat_template=value)


PLACES: dict[str, Callable[[Path], None]] = {
    "none": lambda directory: None,
    "a file": lambda directory: _in_files(directory, "chat_template.jinja"),
    "files": lambda directory: _in_files(directory, "chat_template.jinja", "additional_chat_templates/tool_use.jinja"),
    "another file alone": lambda directory: _in_files(directory, "additional_chat_templates/tool_use.jinja"),
    "a text": lambda directory: _inline(directory, TEMPLATE),
    "a list": lambda directory: _inline(directory, NAMED),
    "a list of one": lambda directory: _inline(directory, NAMED[:1]),
    "null": lambda directory: _inline(directory, None),
}


@pytest.mark.parametrize("place", PLACES)
def test_the_chat_templates_are_those_of_transformers(tmp_path: Path, place: str) -> None:
    parts.save_tokenizer(tmp_path, template=None)
    PLACES[place](tmp_path)

    loaded = AutoTokenizer.from_pretrained(tmp_path).chat_template

    expected = loaded if isinstance(loaded, dict) else {"default": loaded} if loaded else {}
    by_file = chat_templates(tmp_path, ConvertError)
    stems = {Path(file).stem: text.decode() for file, text in by_file.items()}
    assert {stem if stem != "chat_template" else "default": text for stem, text in stems.items()} == expected


def test_the_template_of_a_processor_is_that_of_transformers(tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (tmp_path / "processor_config.json").write_text("{}")

    loaded = ProcessorMixin.get_processor_dict(tmp_path)[0]["chat_template"]

    assert chat_templates(tmp_path, ConvertError) == {"chat_template.jinja": loaded.encode()}


@pytest.mark.parametrize("place", ["files", "another file alone", "a list", "a list of one"])
def test_another_template_is_noticed_in_every_place(desk: Desk, place: str) -> None:
    path = write_adapter(desk.roots / "pirate", "pirate")
    for directory in (desk.base, path):
        parts.save_tokenizer(directory, template=None)
        PLACES[place](directory)
    desk.take(path)

    if place == "a list of one":
        _inline(path, [{"name": "default", "template": "{{ other }}"}])
    elif place == "a list":
        _inline(path, [NAMED[0], {"name": "tool_use", "template": "{{ other }}"}])
    else:
        (path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ other }}")

    with pytest.raises(AdapterRejected, match="another chat template"):
        desk.take(path)


@pytest.mark.parametrize("value", [7, True, [7], [{"name": "x"}], [{"name": 7, "template": "x"}], {"default": "x"}])
def test_a_damaged_chat_template_is_refused_by_name(desk: Desk, value: object) -> None:
    path = write_adapter(desk.roots / "pirate", "pirate")
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))

    with pytest.raises(AdapterRejected, match=r"tokenizer_config\.json: chat_template is neither"):
        desk.take(path)


def test_a_template_that_is_no_text_is_refused_by_name(desk: Desk) -> None:
    path = write_adapter(desk.roots / "pirate", "pirate")
    (path / "chat_template.jinja").write_bytes(b"\xff\xfe{{ messages }}")

    with pytest.raises(AdapterRejected, match=r"chat_template\.jinja is not UTF-8 text"):
        desk.take(path)
