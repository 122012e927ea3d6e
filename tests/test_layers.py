"""Imports point down, and each heavy library is met where it belongs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache

import grimp
import pytest
from importlinter import cli

IMPORTERS = {
    "vllm": {"serve.vllm_engine", "serve.cpu_lora"},
    "ray": {"serve.replica", "serve.app", "serve.local", "serve.ledger_actor"},
}
TORCH_USERS = ("convert.", "serve.vllm_engine", "serve.cpu_lora")


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

    assert known == {"convert.artifact", "convert.errors", "convert.signature"}
