"""The reference pages name everything there is, and nothing that there isn't."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

import convert.errors
import serve.errors
from benchmarks.report import PAGE, page
from serve.config import (
    AdmissionSettings,
    EngineSettings,
    GatewaySettings,
    LogSettings,
    MetricsSettings,
    OidcSettings,
    ServeSettings,
    TracingSettings,
)
from serve.metrics import ALL, OF_EXPORTER
from serve.openai import ENGINE_ROUTES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def subclasses(error: type) -> set[type]:
    return {error}.union(*(subclasses(each) for each in error.__subclasses__()))


def codes(error: type) -> set[str]:
    """The codes of the classes that are raised: those without subclasses."""
    return {it.code for it in subclasses(error) if not it.__subclasses__()}


def first_column(page: Path, heading: str) -> set[str]:
    section = page.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return set(re.findall(r"^\| `([^`]+)`", section, re.MULTILINE))


def test_every_error_code_is_documented_and_every_documented_one_exists() -> None:
    page = DOCS / "errors.md"

    assert first_column(page, "Converting") == codes(convert.errors.ConvertError)
    assert first_column(page, "Serving") == codes(serve.errors.ServeError) | {"server_error", "invalid_settings"}


SETTINGS = [
    ServeSettings, EngineSettings, GatewaySettings, AdmissionSettings, OidcSettings, MetricsSettings, LogSettings,
    TracingSettings,
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_setting_is_documented_and_every_documented_one_exists(settings: type[BaseModel]) -> None:
    assert first_column(DOCS / "settings.md", settings.__name__) == set(settings.model_fields)


def test_every_metric_is_documented_as_it_is_and_every_documented_one_exists() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| (\w+) \| (.*?) \| (.*) \|$", (DOCS / "metrics.md").read_text(), re.MULTILINE)

    told = {name: (kind, tuple(re.findall(r"`(\w+)`", labels)), meaning) for name, kind, labels, meaning in rows}
    assert told == {it.name: (it.kind, () if it in OF_EXPORTER else it.labels, it.help) for it in ALL}
    assert len(rows) == len(ALL)


def test_every_public_route_is_documented() -> None:
    page = (DOCS / "api.md").read_text()

    assert [route for route in ENGINE_ROUTES if f"POST {route}`" not in page] == []


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.md")) + sorted(DOCS.rglob("*.md")), ids=lambda it: it.name)
def test_every_link_between_pages_leads_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", path.read_text())

    assert [link for link in links if "://" not in link and not (path.parent / link).exists()] == []


def test_the_readme_quotes_the_measured_figures() -> None:
    figures = json.loads((ROOT / "benchmarks" / "results" / "routes.json").read_text())["figures"]
    readme = (ROOT / "README.md").read_text()

    graft = ("adapter", "exact_float16", "exact_bfloat16", "rebase_64", "recover_64")
    for way in (*graft, "original_bfloat16", "original_nf4", "peft_nf4", "base"):
        chat, other = (figures[f"{way}_kl_{text}"]["value"] for text in ("chat", "other_text"))
        assert f"| {chat:.2g} | {other:.2g} |" in readme, way


def test_the_readme_quotes_the_swaps_and_the_faults() -> None:
    swap, chaos = (
        {
            key: it["value"]
            for key, it in json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())["figures"].items()
        }
        for name in ("swap", "chaos")
    )
    readme = " ".join((ROOT / "README.md").read_text().split())

    assert (
        f"**{swap['swaps']} swaps under load**, on two engines: {swap['requests']:,} requests, "
        f"{swap['failed_requests']} failed, {swap['mixed_or_stale_responses']} mixed or stale." in readme
    )
    assert f"{swap['bare_mixed_or_stale_responses']} mixed or stale of {swap['bare_requests']:,}." in readme
    assert (
        f"**{chaos['faults']} faults under load**, from a killed engine to a full disk: "
        f"{chaos['requests']:,} requests, "
        f"{chaos['wrong_answers']} wrong answers, {chaos['hung_requests']} hung, "
        f"{chaos['acknowledged_lost']} acknowledged" in readme
    )


def test_the_report_is_made_of_the_committed_results() -> None:
    assert PAGE.read_text() == page(), "run: make report"


def test_readme_commands_are_targets_of_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))

    assert set(re.findall(r"\bmake ([a-z-]+)", (ROOT / "README.md").read_text())) <= targets
