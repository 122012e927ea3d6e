"""Puts the adapter in a directory into the store and returns it as a candidate. The directory holds an artifact, or a
plain PEFT adapter as other servers take it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from convert.artifact import GOLDEN, MANIFEST, Artifact, digest, file_sha256, problems_of
from convert.artifact.chat_templates import chat_templates
from convert.artifact.json_files import read_json
from convert.artifact.signature import signature_of
from convert.errors import ArtifactInvalid
from serve.adapters.file_validation import ADAPTER_FILES, CONFIG, WEIGHTS, largest_rank, read_config
from serve.catalogue.adapter_store import AdapterStore, copy_from
from serve.catalogue.candidate import Candidate, Lineage
from serve.errors import AdapterRejected, ArtifactRefused, PathRefused
from serve.settings import AdmissionSettings, EngineSettings

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_MAX_GOLDEN_BYTES = 16 << 20


def ingest_artifact(artifact: Artifact, name: str | None, store: AdapterStore) -> Candidate:
    """Puts the adapter of a verified artifact into the store, under `name` or the artifact's own. Raises
    ArtifactRefused if the artifact has no adapter, or if the name is not valid."""
    adapter, source = artifact.manifest.adapter, artifact.adapter_path
    candidate = candidate_of(artifact, name)
    if adapter is None or source is None:
        raise ArtifactRefused(f"{artifact.root} holds no adapter.")
    if unexpected := sorted(set(adapter.files) - set(ADAPTER_FILES)):
        raise ArtifactRefused(
            f"{artifact.root} has other files in its adapter than it should: {', '.join(unexpected)}."
        )
    if candidate.golden:
        store.put_golden(candidate.golden, _read_golden(artifact.root / GOLDEN))
    store.put(adapter.revision, adapter.files, copy_from(source))
    return candidate


def candidate_of(artifact: Artifact, name: str | None) -> Candidate:
    """The artifact's adapter as a candidate. Raises ArtifactRefused for a merged model, or for a name that is not
    valid."""
    try:
        candidate = Candidate.of(artifact.manifest, name, signature_of(artifact.root))
    except ValidationError as error:
        raise ArtifactRefused(
            f"{name!r} can't be a name: lower-case letters, digits, '.', '_' and '-' only."
        ) from error
    if candidate is None:
        raise ArtifactRefused(
            f"{artifact.root} holds a merged model, not an adapter. Serve it with: python -m serve run"
        )
    return candidate


def open_verified(root: Path) -> Artifact:
    """The artifact in a directory, with all its digests checked. Raises ArtifactRefused."""
    try:
        artifact = Artifact.open(root)
        artifact.verify()
    except ArtifactInvalid as error:
        raise ArtifactRefused(str(error)) from error
    return artifact


def ingest_path(
    path: Path,
    name: str | None,
    store: AdapterStore,
    engine_of_plain: Callable[[], EngineSettings],
    admission: AdmissionSettings,
) -> Candidate:
    """Puts the adapter at a path that a caller of the API named into the store. `engine_of_plain`: for an adapter that
    is no artifact and does not say itself which base model it was made for; may raise AdapterRejected.

    Raises PathRefused for a path outside `adapter_roots` or with symbolic links in it, AdapterRejected or
    ArtifactRefused for an adapter that can't be served.
    """
    if not admission.adapter_roots:
        raise PathRefused(
            "This server takes no paths from callers: start it with --adapter-root DIR, or publish with "
            "`python -m serve publish`, which sends the files."
        )
    root = allowed_directory(path, admission.adapter_roots)
    check_no_links(root)
    if (root / MANIFEST).is_file():
        return ingest_artifact(open_verified(root), name, store)
    engine = engine_of_plain()
    _check_adapter_files(root)
    _check_size(root, admission.max_adapter_bytes)
    if not admission.allow_other_template:
        _check_tokenizer(root, engine.model_path)
    files = {file: file_sha256(root / file) for file in ADAPTER_FILES}
    candidate = _plain_candidate(root, name or root.name, digest(files), engine)
    store.put(candidate.revision, files, copy_from(root))
    return candidate


def allowed_directory(path: Path, roots: Sequence[Path]) -> Path:
    """The real path of a directory. Raises PathRefused unless it is below one of the roots, after all symbolic links
    on the way to it are resolved."""
    try:
        real = Path(os.path.realpath(path))
        is_directory = real.is_dir()
    except (OSError, ValueError) as error:  # too long, or with a null byte
        raise PathRefused(f"{str(path)[:200]!r} is no path: {error}.") from None
    if not path.is_absolute() or not any(real.is_relative_to(os.path.realpath(root)) for root in roots):
        allowed = ", ".join(map(str, roots))
        raise PathRefused(f"{path} is not below a directory that this server takes files from ({allowed}).")
    if not is_directory:
        raise PathRefused(f"{path} is not a directory on the server's machine.")
    return real


def check_no_links(directory: Path) -> None:
    """Raises PathRefused if the directory holds anything but files and directories."""
    for entry in directory.rglob("*"):
        if not stat.S_ISREG(mode := entry.lstat().st_mode) and not stat.S_ISDIR(mode):
            raise PathRefused(f"{entry} is a symbolic link or no file at all; copy the file itself there.")


def _check_adapter_files(root: Path) -> None:
    """Raises AdapterRejected if a file of a PEFT adapter is missing."""
    missing = [file for file in ADAPTER_FILES if not (root / file).is_file()]
    pickles = sorted(path.name for path in root.iterdir() if path.suffix in _PICKLES)
    if WEIGHTS in missing and pickles:
        raise AdapterRejected(
            f"{root} holds {', '.join(pickles)} but no {WEIGHTS}: pickled files can run code and are never read. "
            "Save the adapter as safetensors."
        )
    if missing:
        raise AdapterRejected(f"{root} is no PEFT adapter: it has no {', '.join(missing)}.")


def _check_size(root: Path, max_bytes: int) -> None:
    size = sum((root / file).stat().st_size for file in ADAPTER_FILES)
    if size > max_bytes:
        raise AdapterRejected(f"{root} has {size} bytes, more than this server's {max_bytes} (max_adapter_bytes).")


def _plain_candidate(root: Path, name: str, revision: str, engine: EngineSettings) -> Candidate:
    base = read_config(root / CONFIG).get("base_model_name_or_path")
    try:
        return Candidate(
            name=name,
            revision=revision,
            base=engine.fingerprint,
            rank=largest_rank(root),
            lineage=Lineage(source=str(base or "unknown"), layout="peft", origin=revision),
        )
    except ValidationError as error:
        raise AdapterRejected(f"{name!r} can't be a name: {problems_of(error)}.") from error


def _check_tokenizer(root: Path, model: Path) -> None:
    """Raises AdapterRejected if the adapter comes with another vocabulary or chat template than the base model has:
    here it would get other prompts than it was trained on."""
    differences = [
        part
        for part, read in (("tokenizer", _read_vocabulary), ("chat template", _read_templates))
        if (own := read(root)) and own != read(model)
    ]
    if differences:
        raise AdapterRejected(
            f"{root} was trained with another {' and another '.join(differences)} than the base model has, so that it "
            "would get other prompts than in training. Convert it with its own, or allow it (--allow-other-template)."
        )


def _read_vocabulary(directory: Path) -> Mapping[str, object] | None:
    """The parts of tokenizer.json that decide which ids a text becomes. Trainers also save padding and truncation in
    that file, which do not."""
    tokenizer = _read_json(directory / "tokenizer.json")
    return None if tokenizer is None else {key: tokenizer.get(key) for key in ("model", "added_tokens", "normalizer")}


def _read_templates(directory: Path) -> Mapping[str, bytes]:
    """The chat templates by the names of their files. White space around a text does not count, since trainers add
    it. Raises AdapterRejected for a damaged file."""
    try:
        return {name: text.strip() for name, text in chat_templates(directory, ArtifactInvalid).items()}
    except ArtifactInvalid as error:
        raise AdapterRejected(str(error)) from error


def _read_json(path: Path) -> dict[str, object] | None:
    if not path.is_file():
        return None
    try:
        return read_json(path, ArtifactInvalid)
    except ArtifactInvalid as error:
        raise AdapterRejected(str(error)) from error


def _read_golden(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_GOLDEN_BYTES:
            raise ArtifactRefused(f"{path} has more than {_MAX_GOLDEN_BYTES} bytes.")
        return path.read_bytes()
    except OSError as error:
        raise ArtifactRefused(f"{path} is missing, though the manifest names it; convert or copy it again.") from error
