"""The checker itself, on a library that is written here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contracts.contract import Contract, Library
from tests.contracts.own_files import undeclared, undeclared_attributes

SOURCES = {
    "engine/__init__.py": "from .base import Base as Exported\n",
    "engine/base.py": "class Base:\n    limit: int = 0\n    def __init__(self):\n        self._inner = 1\n",
    "engine/core.py": """
from engine import Exported

class Core(Exported):
    async def run(self, prompt, parameters, *, adapter=None, **options): ...

    @property
    def is_dead(self): ...

    def start(self): return self.run("", None)

if True:
    def build(args, tasks): ...

@router.post("/v1/answers")
async def answers(request): ...
""",
}


@pytest.fixture
def library(tmp_path: Path) -> Library:
    for name, text in SOURCES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return Library("absent", "pytest", overlay=tmp_path)


@pytest.mark.parametrize(
    "contract",
    [
        {"engine.core:Core": ("is_dead", "limit", "_inner")},
        {"engine.core:Core.run": ("prompt", "parameters", "/", "adapter")},
        {"engine.core:Core.run": ("prompt", "parameters", "**")},
        {"engine.core:build": ("args", "tasks")},
        {"engine.core": ("build",)},
        {"engine:Exported": ("limit",)},
        {"engine.core:POST /v1/answers": ()},
        {"engine.core:uses self.run": ()},
        {"engine.core:text /v1/answers": ()},
    ],
)
def test_what_is_there_is_found(library: Library, contract: Contract) -> None:
    assert library.broken(contract) == []


@pytest.mark.parametrize(
    ("contract", "problem"),
    [
        ({"engine.gone:Core": ()}, "there is no module engine.gone"),
        ({"engine.core:Gone": ()}, "engine.core has no Gone"),
        ({"engine.core:Core": ("_outer",)}, "engine.core:Core has no `_outer`"),
        ({"engine.core:Core.run": ("prompt", "parameters", "lora")}, "has no parameter `lora`; it has (self, prompt,"),
        ({"engine.core:Core.run": ("prompt",)}, "requires `parameters`, which is never passed"),
        ({"engine.core:build": ("tasks", "args", "/")}, "engine.core:build doesn't begin with (tasks, args)"),
        ({"engine.core:build": ("args", "tasks", "**")}, "has no parameter `**`"),
        ({"engine.core:uses self.is_dead": ()}, "engine.core no longer uses self.is_dead"),
        ({"engine.core:POST /v1/questions": ()}, "engine.core has no route POST /v1/questions"),
        ({"engine.core:text /v1/questions": ()}, "engine.core no longer has the text /v1/questions"),
    ],
)
def test_what_is_not_there_is_named_with_the_version(library: Library, contract: Contract, problem: str) -> None:
    (message,) = library.broken(contract)

    assert problem in message
    assert message.startswith(f"pytest {pytest.__version__}: ")


def test_own_code_that_touches_more_than_its_contract_says_is_named(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text("""
from engine.core import Core, build

class Counted(Core):
    def run(self): self._mine = build()

def patch(core):
    core._inner.limit = core.is_dead
""")

    assert sorted(undeclared([own], "engine", {"engine.core:Core": ()})) == [
        "own.py uses engine.core:Core.run",
        "own.py uses engine.core:build",
    ]
    assert undeclared_attributes([own], {"engine.core:Core": ("limit",)}) == ["own.py:8 touches `core._inner`"]
    assert undeclared_attributes([own], {"engine.core:Core": ("limit", "_inner")}) == []
