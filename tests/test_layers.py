"""Imports point down, each heavy library is imported only where it belongs, and files and packages stay small."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import grimp
import pytest
from importlinter import cli

IMPORTERS = {
    "vllm": {
        "serve.engine.vllm_engine",
        "serve.engine.vllm_patches",
        "serve.engine.cpu_lora",
        "serve.engine.grammars.vllm_grammars",
    },
    "ray": {
        "serve.callers.ledger_ray",
        "serve.deployment.app",
        "serve.deployment.local",
        "serve.deployment.pools.changes",
        "serve.deployment.ray_patches",
        "serve.deployment.ray_replicas",
        "serve.deployment.replica",
    },
}
ROOT = Path(__file__).parents[1]
PACKAGES = ("convert", "serve", "deploy", "examples", "benchmarks", "tests")
MOST_LINES = 300
MOST_ENTRIES = 14

TORCH_USERS = ("convert.", "serve.engine.vllm_engine", "serve.engine.cpu_lora", "serve.engine.worker")


@cache
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("convert", "serve", include_external_packages=True, cache_dir=None)


@pytest.fixture
def loggers() -> Iterator[None]:
    """import-linter configures logging, and that silences the loggers of everyone else."""
    yield
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.disabled = False


@pytest.mark.usefixtures("loggers")
def test_layers_hold() -> None:
    assert cli.lint_imports(no_cache=True) == cli.EXIT_STATUS_SUCCESS


@pytest.mark.parametrize("library", IMPORTERS)
def test_only_its_own_modules_import(library: str) -> None:
    assert graph().find_modules_that_directly_import(library) == IMPORTERS[library]


def test_torch_stays_in_the_conversion_stage() -> None:
    importers = graph().find_modules_that_directly_import("torch")

    assert [module for module in importers if not module.startswith(TORCH_USERS)] == []


def test_serve_knows_the_artifact_and_nothing_else_of_convert() -> None:
    known = {
        imported
        for module in graph().modules
        if module.startswith("serve")
        for imported in graph().find_modules_directly_imported_by(module)
        if imported.startswith("convert")
    }

    assert {module for module in known if not module.startswith("convert.artifact")} == {"convert.errors"}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_is_too_long_to_be_read_at_once(package: str) -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in (ROOT / package).rglob("*.py")}

    assert {path: count for path, count in lines.items() if count > MOST_LINES} == {}


def holds_files(path: Path) -> bool:
    """False for the directory that a removed package leaves behind: compiled modules at most."""
    return path.is_file() or any(file.suffix != ".pyc" for file in path.rglob("*") if file.is_file())


@pytest.mark.parametrize("package", ["convert", "serve"])
def test_no_package_has_more_entries_than_one_can_survey(package: str) -> None:
    not_counted = {"__init__.py", "__main__.py", "__pycache__"}
    directories = [path.parent for path in (ROOT / package).rglob("__init__.py")]
    entries = {
        str(directory.relative_to(ROOT)): len(
            {path.name for path in directory.iterdir() if holds_files(path)} - not_counted
        )
        for directory in directories
    }

    assert {path: count for path, count in entries.items() if count > MOST_ENTRIES} == {}
