"""What an engine's process checks before it loads a model that was added to a running server."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path

import pytest

from serve.deployment.pools.room import check_model
from serve.errors import EngineRefused
from serve.settings import EngineSettings, GatewaySettings, ServeSettings
from tests.serve.conftest import MakeArtifact


def test_an_added_pool_serves_only_the_model_that_was_added(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    artifact = make_artifact("merged", name="merged", weights=None, base="merged weights")
    assert artifact.model_path
    engine = EngineSettings(
        model_path=artifact.model_path, model_name="merged", fingerprint=artifact.manifest.model.fingerprint
    )
    gateway = GatewaySettings(admin_tokens={"admin": "0" * 64})
    added = ServeSettings(engine=engine, gateway=gateway, state_dir=tmp_path, added=True)
    (artifact.model_path / "config.json").write_text("{}")
    check_model(added)

    with pytest.raises(EngineRefused, match="another model than when it was added"):
        check_model(added.model_copy(update={"engine": engine.model_copy(update={"fingerprint": "0" * 64})}))
    shutil.move(artifact.root / "manifest.json", tmp_path / "manifest.json")
    with pytest.raises(EngineRefused, match=r"manifest\.json"):
        check_model(added)
    check_model(added.model_copy(update={"added": False}))
    shutil.rmtree(artifact.model_path)
    with pytest.raises(EngineRefused, match="There is no model in"):
        check_model(added.model_copy(update={"added": False}))


def test_a_multimodal_model_is_refused_where_vllm_lacks_a_library_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM would fail in the engine's process, after a minute and for every attempt."""
    settings = ServeSettings(
        engine=EngineSettings(model_path=tmp_path, model_name="gemma", fingerprint="0" * 64),
        gateway=GatewaySettings(admin_tokens={"admin": "0" * 64}),
        state_dir=tmp_path,
    )
    (tmp_path / "config.json").write_text('{"model_type": "gemma3", "vision_config": {}}')
    libraries = tmp_path / "libraries"
    monkeypatch.syspath_prepend(libraries)
    monkeypatch.setattr(sys, "path", [str(libraries)])
    with pytest.raises(EngineRefused, match="vLLM imports torchvision"):
        check_model(settings)

    (libraries / "torchvision").mkdir(parents=True)
    importlib.invalidate_caches()
    check_model(settings)
    (tmp_path / "config.json").write_text('{"model_type": "gemma3_text"}')
    (libraries / "torchvision").rmdir()
    check_model(settings)
