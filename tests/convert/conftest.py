"""Models and checkpoints are made once per session; a test that changes one takes a copy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from tests.convert import parts


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


@pytest.fixture(scope="session")
def base(home: Path) -> Path:
    """Tied embeddings, bfloat16, as SmolLM2."""
    return parts.save_base(home / "tiny-llama", tied=True)


@pytest.fixture(scope="session")
def untied_base(home: Path) -> Path:
    return parts.save_base(home / "tiny-untied", tied=False)


@pytest.fixture(scope="session")
def base_with_biases(home: Path) -> Path:
    """A bias in every linear layer; Qwen2 has them in three of seven."""
    return parts.save_base(home / "tiny-biased", tied=True, biases=True)


@pytest.fixture(scope="session")
def nf4_base(home: Path, base: Path) -> Path:
    return parts.save_quantized(base, home / "tiny-llama-bnb-4bit")


@pytest.fixture(scope="session")
def qlora(home: Path, base: Path) -> Path:
    return parts.mark_qlora(parts.save_adapter(base, home / "qlora"))


@pytest.fixture(scope="session")
def lora(home: Path, base: Path) -> Path:
    return parts.mark_lora(parts.save_adapter(base, home / "lora"))


@pytest.fixture(scope="session")
def unmarked(home: Path, base: Path) -> Path:
    """A plain PEFT adapter: nothing says how it was trained."""
    return parts.save_adapter(base, home / "unmarked")


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """A destination. After the test nothing lies beside it but the destination itself."""
    folder = tmp_path / "published"
    folder.mkdir()
    yield folder / "tiny"
    assert {path.name for path in folder.iterdir()} <= {"tiny"}
