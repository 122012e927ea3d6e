"""The installed FastAPI, Starlette and pydantic have everything that serve.engine changes in them."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from serve.engine.fastapi_patches import CONTRACT
from tests.contracts.contract import Library
from tests.contracts.renamed import with_renamed


def test_fastapi_keeps_the_contract() -> None:
    assert Library("fastapi").broken(CONTRACT) == []


@pytest.mark.parametrize(
    ("module", "name", "problem"),
    [
        ("fastapi._compat.v2", "_type_adapter", "fastapi._compat.v2:ModelField has no `_type_adapter`"),
        ("pydantic.type_adapter", "validator", "pydantic.type_adapter:TypeAdapter has no `validator`"),
        ("starlette.middleware", "cls", "starlette.middleware:Middleware has no `cls`"),
    ],
)
def test_a_renamed_name_is_reported_with_the_version(tmp_path: Path, module: str, name: str, problem: str) -> None:
    library = module.partition(".")[0]
    with_renamed(Library("fastapi"), tmp_path, module, name)

    messages = Library("fastapi", overlay=tmp_path).broken(CONTRACT)

    assert f"{library} {metadata.version(library)}: {problem}" in messages
