"""One concept has one name, and that name is the field's standard term (docs/decisions/0015)."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("convert", "serve", "deploy", "examples", "benchmarks", "tests")

# A private word, and the standard term to use instead.
STANDARD_TERMS = {
    # a request's way through the gateway
    "Passage": "RequestPolicy",
    "Passages": "RequestPolicy",
    "Places": "EngineQueue",
    "Turns": "SlotScheduler",
    "Readers": "SlowClientGuard",
    "Witness": "ResponsePipeline",
    "Corked": "CoalescingTransport",
    "corked": "with_write_coalescing",
    "cork": "CoalescingTransport",
    "straight": "raw_send",
    # metrics
    "Observed": "TelemetryMiddleware",
    "Recorder": "MetricsRecorder",
    "Busiest": "LabelLimiter",
    "Told": "ScrapeResult",
    "last_words": "final_snapshot",
    # limits
    "Demand": "TokenReservation",
    "demand_of": "TokenReservation.for_request",
    "Claim": "Reservation",
    "Standing": "WindowUsage",
    "Verdict": "Decision",
    "Ledgers": "RateLimitBackend",
    # adapters
    "Sentinel": "IdentityChecker",
    "Prover": "RevisionVerifier",
    "unload_strangers": "unload_unknown",
    "strangers": "unknown adapters",
    "mended": "drift_repaired",
    "Cause": "Audit",
    "Terms": "SplitPolicy",
    # what is changed in libraries
    "on_listening": "patch_uvicorn_startup",
    "tell_misread": "map_client_errors_to_400",
    "misread": "client error",
    # capacity
    "Alone": "DedicatedPlan",
    "Asked": "ModelTraffic",
    # converting
    "Wish": "RouteOptions, or SizingRequest in capacity",
    "Way": "RouteVariant",
    "Form": "OutputFormat",
    "Job": "PreparedRequest",
    "Scheme": "QuantizationFormat",
    "Bench": "Evaluator",
    "making": "build",
    "Made": "BuildResult",
    "survey": "compare",
    "provenance": "training_sources, or quantization_alignment",
    "halves": "lora_weights: A and B",
    "by_halves": "unpermute_rotary",
    "normalised": "dora_rescale",
    "untied": "untie_head",
    "Patch": "WeightUpdate",
    "Halves": "LoraWeights",
    "Kept": "ReferenceLogits",
    "Lesson": "DistillationExample",
    "Course": "TrainingSchedule",
    # words that name nothing
    "told": "what it holds: message, answer, entry, decision, caught …",
    "made": "what it holds: adapter, artifact, response …",
    "mine": "what it holds: writer, part, receiver …",
}

# Words that name nothing either, but only as variables and parameters: a check of `convert verify` has a field `found`.
EMPTY_WORDS = {
    "it": "what it holds: adapter, row, message …",
    "found": "what it holds: problems, matches, references …",
}


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every name that a module defines or uses, with its line, without leading underscores."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                yield node.end_lineno or 0, name.strip("_")
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name.strip("_")
            case ast.keyword(arg=str(name)) | ast.ExceptHandler(name=str(name)):
                yield node.lineno, name.strip("_")
            case ast.alias(name=name, asname=other):
                for part in (*name.split("."), *([other] if other else [])):
                    yield node.lineno, part.strip("_")


def words_to_replace(
    package: str, names_of: Callable[[ast.AST], Iterator[tuple[int, str]]], terms: Mapping[str, str]
) -> list[str]:
    """A line for each name in the modules of a package that has a better term: its place, and the term."""
    return [
        f"{path.relative_to(ROOT)}:{line}: {name}: use {terms[name]}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for line, name in names_of(ast.parse(path.read_text()))
        if name in terms
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_names_are_the_standard_terms(package: str) -> None:
    private_words = words_to_replace(package, identifiers, STANDARD_TERMS)

    assert not private_words, "\n".join(private_words)


def variables(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every variable and parameter of a module with its line, without the fields of classes."""
    fields = {
        id(statement.target)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for statement in node.body
        if isinstance(statement, ast.AnnAssign)
    }
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) if id(node) not in fields:
                yield node.lineno, name.strip("_")
            case ast.arg(arg=name):
                yield node.lineno, name.strip("_")


@pytest.mark.parametrize("package", PACKAGES)
def test_variables_say_what_they_hold(package: str) -> None:
    empty_words = words_to_replace(package, variables, EMPTY_WORDS)

    assert not empty_words, "\n".join(empty_words)


@pytest.mark.parametrize("package", ["convert", "serve"])
def test_modules_are_named_by_the_standard_terms(package: str) -> None:
    modules = {path.stem for path in (ROOT / package).rglob("*.py")} | {
        path.name for path in (ROOT / package).rglob("*") if path.is_dir()
    }

    assert sorted(modules & STANDARD_TERMS.keys()) == []


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")], ids=lambda page: page.name)
def test_code_in_the_documentation_uses_the_standard_terms(page: Path) -> None:
    code = " ".join(re.findall(r"`([^`\n]+)`", page.read_text()))
    words = set(re.findall(r"\w+", code)) - {"Job"}  # a kind of Kubernetes

    assert sorted(words & STANDARD_TERMS.keys()) == []
