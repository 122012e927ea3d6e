"""The settings file of a deployment: it names an artifact and a mounted secret, from which digests are computed.

    engine:
      artifact: /srv/graft/artifacts/base     # instead of model_path and fingerprint; model_name may be left out
    gateway:
      admin_tokens_dir: /srv/graft/admin      # instead of admin_tokens: a file LABEL.token for each

Everything else is ServeSettings. `state_url` may be left to the variable GRAFT_STATE_URL, which pods have from the same
ConfigMap as those who publish.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from serve.deployment.pools.bundle import bundles_of
from serve.errors import StateInvalid
from serve.settings import ServeSettings
from serve.settings.admin_tokens import token_digests
from serve.settings.unique_yaml import load_yaml

STATE_URL_VARIABLE = "GRAFT_STATE_URL"
_FILE = "settings_file"


def settings_of(args: Mapping[str, Any]) -> ServeSettings:
    """The arguments of the Ray Serve application: ServeSettings as plain data, or `settings_file`, a path to such a
    document. Raises ValidationError, StateInvalid or ArtifactRefused."""
    return ServeSettings.model_validate(args) if _FILE not in args else read_settings(Path(args[_FILE]))


def read_settings(path: Path) -> ServeSettings:
    """Raises ValidationError, StateInvalid if there is no such document, ArtifactRefused if the artifact is broken."""
    document = _read(path)
    engine, gateway = (_mapping(document, part, path) for part in ("engine", "gateway"))
    if artifact := engine.pop("artifact", None):
        name: dict[Path | None, str] = {None: engine["model_name"]} if engine.get("model_name") else {}
        (bundle,) = bundles_of([_path(artifact, "engine.artifact", path)], name)
        engine |= {
            "model_path": bundle.model_path,
            "model_name": bundle.model_name,
            "fingerprint": bundle.fingerprint,
        }
    if directory := gateway.pop("admin_tokens_dir", None):
        gateway["admin_tokens"] = _tokens(_path(directory, "gateway.admin_tokens_dir", path))
    state = _place_of_state(document, path)
    return ServeSettings.model_validate(document | state | {"engine": engine, "gateway": gateway})


def artifact_of(path: Path) -> Path | None:
    """The directory that `engine.artifact` names; None if the file names none. Raises StateInvalid."""
    artifact = _mapping(_read(path), "engine", path).get("artifact")
    return _path(artifact, "engine.artifact", path) if artifact else None


def _place_of_state(document: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Raises StateInvalid if the file and the variable name two places: servers and publishers would not meet."""
    url, named = os.environ.get(STATE_URL_VARIABLE), document.get("state_url")
    if url and named not in (None, url):
        raise StateInvalid(
            f"{path} says state_url: {named}, and the variable {STATE_URL_VARIABLE} (the ConfigMap graft-state-place) "
            f"{url}. Name one place: leave state_url out of the file."
        )
    return {"state_url": url} if url else {}


def _mapping(document: Mapping[str, Any], part: str, path: Path) -> dict[str, Any]:
    settings = document.get(part) or {}
    if not isinstance(settings, dict):
        raise StateInvalid(f"{part} of the settings file {path} must be a mapping.")
    return dict(settings)


def _path(value: object, name: str, path: Path) -> Path:
    if not isinstance(value, str) or "\0" in value:
        raise StateInvalid(f"{name} of the settings file {path} must be a path.")
    return Path(value)


def _read(path: Path) -> dict[str, Any]:
    try:
        document = load_yaml(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise StateInvalid(f"The settings file {path} can't be read: {error}") from error
    if not isinstance(document, dict):
        raise StateInvalid(f"The settings file {path} must hold ServeSettings as a YAML mapping.")
    return document


def _tokens(directory: Path) -> dict[str, str]:
    """The SHA-256 of each token, by label. Raises StateInvalid if there is no token, or one that can't be used."""
    tokens = token_digests(directory)
    if not tokens:
        raise StateInvalid(f"{directory} holds no LABEL.token: without one nobody could publish an adapter.")
    return tokens
