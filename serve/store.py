"""The content-addressed store of adapter files: the only place the engine reads adapters from.

    DIR/<revision>/adapter_config.json, adapter_model.safetensors

vLLM re-reads an evicted adapter from its path and dies if the files are gone or reads other weights if they
changed. So a revision's files are written once, never altered, and outlive its last use.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from convert.artifact import Artifact, digest, file_digests
from serve.errors import AdapterUnavailable, ArtifactRefused
from serve.names import AdapterRevision


class AdapterStore:
    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def path(self, adapter: AdapterRevision) -> Path:
        """Where the files of a revision lie. Raises AdapterUnavailable if they are not here."""
        path = self._directory / adapter.revision
        if not path.is_dir():
            raise AdapterUnavailable(f"The files of {adapter} are not in the adapter store; publish it again.")
        return path

    def put(self, artifact: Artifact) -> None:
        """Copy the artifact's adapter in, under the digest of what arrived. Idempotent; appears by one rename.
        Raises ArtifactRefused if it has no adapter or its bytes are not what the manifest says."""
        adapter = artifact.manifest.adapter
        if adapter is None or artifact.adapter_path is None:
            raise ArtifactRefused(
                f"{artifact.root} holds a merged model, not an adapter: nothing to publish. "
                "Serve it with: python -m serve run ARTIFACT"
            )
        destination = self._directory / adapter.revision
        if destination.is_dir():
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=self._directory, prefix=".incoming-"))
        try:
            _copy_durably(artifact.adapter_path, temporary, adapter.files)
            if digest(file_digests(temporary)) != adapter.revision:
                raise ArtifactRefused(
                    f"The adapter in {artifact.root} is not the one its manifest names "
                    f"({adapter.revision[:12]}): its bytes changed. Convert or copy it again."
                )
            temporary.chmod(0o755)
            if not destination.is_dir():
                temporary.rename(destination)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _copy_durably(source: Path, destination: Path, names: dict[str, str]) -> None:
    for name in names:
        target = destination / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target)
        with target.open("rb") as stream:
            os.fsync(stream.fileno())
