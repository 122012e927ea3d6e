"""From a directory that someone names to a candidate whose files are in the store: an artifact, or a plain PEFT
adapter as other servers take it."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from convert.artifact import GOLDEN, MANIFEST, Artifact, digest, file_sha256, problems_of
from convert.errors import ArtifactInvalid
from convert.signature import signature_of
from serve.adapter_files import ADAPTER_FILES, CONFIG, WEIGHTS, largest_rank, read_config
from serve.candidate import Candidate, Lineage
from serve.config import AdmissionSettings, EngineSettings
from serve.errors import AdapterRejected, ArtifactRefused, PathRefused
from serve.store import AdapterStore, copy_from

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_MAX_GOLDEN_BYTES = 16 << 20


def take_artifact(artifact: Artifact, name: str | None, store: AdapterStore) -> Candidate:
    """Put a verified artifact's adapter into the store. Raises ArtifactRefused if it has none, or if the name can't
    be one."""
    adapter, source = artifact.manifest.adapter, artifact.adapter_path
    candidate = candidate_of(artifact, name)
    if adapter is None or source is None:
        raise ArtifactRefused(f"{artifact.root} holds no adapter.")
    if strange := sorted(set(adapter.files) - set(ADAPTER_FILES)):
        raise ArtifactRefused(f"{artifact.root} has other files in its adapter than it should: {', '.join(strange)}.")
    if candidate.golden:
        store.put_golden(candidate.golden, _read_golden(artifact.root / GOLDEN))
    store.put(adapter.revision, adapter.files, copy_from(source))
    return candidate


def candidate_of(artifact: Artifact, name: str | None) -> Candidate:
    """Raises ArtifactRefused for a merged model, or a name that can't be one."""
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


def take_path(
    path: Path, name: str | None, store: AdapterStore, engine: EngineSettings, admission: AdmissionSettings
) -> Candidate:
    """Put what lies at a path that a caller of the API named into the store.

    Raises PathRefused for a path outside `adapter_roots` or with symbolic links in it, AdapterRejected or
    ArtifactRefused for what can't be served.
    """
    root = allowed(path, admission.adapter_roots)
    if (root / MANIFEST).is_file():
        return _take_verified(root, name, store)
    _refuse_what_is_no_adapter(root, admission.max_adapter_bytes)
    if not admission.allow_other_template:
        _check_tokenizer(root, engine.model_path)
    files = {file: file_sha256(root / file) for file in ADAPTER_FILES}
    candidate = _plain_candidate(root, name or root.name, digest(files), engine)
    store.put(candidate.revision, files, copy_from(root))
    return candidate


def allowed(path: Path, roots: Sequence[Path]) -> Path:
    """The directory itself. Raises PathRefused unless it lies below one of the roots, with no symbolic link inside it
    and none on the way there that leads out."""
    if not roots:
        raise PathRefused(
            "This server takes no paths from callers: start it with --adapter-root DIR, or publish with "
            "`python -m serve publish`, which sends the files."
        )
    real = Path(os.path.realpath(path))
    if not path.is_absolute() or not any(real.is_relative_to(os.path.realpath(root)) for root in roots):
        told = ", ".join(map(str, roots))
        raise PathRefused(f"{path} is not below a directory that this server takes adapters from ({told}).")
    if not real.is_dir():
        raise PathRefused(f"{path} is not a directory on the server's machine.")
    for entry in real.rglob("*"):
        if not stat.S_ISREG(mode := entry.lstat().st_mode) and not stat.S_ISDIR(mode):
            raise PathRefused(f"{entry} is a symbolic link or no file at all; copy the file itself there.")
    return real


def _take_verified(root: Path, name: str | None, store: AdapterStore) -> Candidate:
    try:
        artifact = Artifact.open(root)
        artifact.verify()
    except ArtifactInvalid as error:
        raise ArtifactRefused(str(error)) from error
    return take_artifact(artifact, name, store)


def _refuse_what_is_no_adapter(root: Path, max_bytes: int) -> None:
    missing = [file for file in ADAPTER_FILES if not (root / file).is_file()]
    if missing:
        pickles = sorted(it.name for it in root.iterdir() if it.suffix in _PICKLES)
        if WEIGHTS in missing and pickles:
            raise AdapterRejected(
                f"{root} holds {', '.join(pickles)} but no {WEIGHTS}: pickled files can run code and are never read. "
                "Save the adapter as safetensors."
            )
        raise AdapterRejected(f"{root} is no PEFT adapter: it has no {', '.join(missing)}.")
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
    """Raises AdapterRejected if the adapter brings another vocabulary or chat template than the base has: it was
    trained on other prompts than it would get here."""
    other = [
        what
        for what, read in (("tokenizer", _vocabulary), ("chat template", _template))
        if (own := read(root)) is not None and own != read(model)
    ]
    if other:
        raise AdapterRejected(
            f"{root} was trained with another {' and another '.join(other)} than the base model has, so that it would "
            "be asked otherwise than it was taught. Convert it with its own, or allow it (--allow-other-template)."
        )


def _vocabulary(directory: Path) -> object:
    """What decides which ids a text becomes; trainers save padding and truncation with it, which don't."""
    document = _json(directory / "tokenizer.json")
    return None if document is None else {it: document.get(it) for it in ("model", "added_tokens", "normalizer")}


def _template(directory: Path) -> object:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(errors="replace").strip()
    template = (_json(directory / "tokenizer_config.json") or {}).get("chat_template")
    return template.strip() if isinstance(template, str) else None


def _json(path: Path) -> dict[str, object] | None:
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise AdapterRejected(f"{path.name} is damaged: {error}.") from error
    return document if isinstance(document, dict) else None


def _read_golden(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_GOLDEN_BYTES:
            raise ArtifactRefused(f"{path} has more than {_MAX_GOLDEN_BYTES} bytes.")
        return path.read_bytes()
    except OSError as error:
        raise ArtifactRefused(f"{path} is missing, though the manifest names it; convert or copy it again.") from error
