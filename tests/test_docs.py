"""The reference pages name everything there is, and nothing that there isn't."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

import convert.cli.app
import convert.errors
import serve.cli.app
import serve.errors
from benchmarks.report import PAGE, page
from serve.engine.api_errors import ENGINE_CODES
from serve.gateway.public_routes import ENGINE_ROUTES
from serve.observability.metrics import ALL, OF_EXPORTER
from serve.settings import (
    AdmissionSettings,
    EngineSettings,
    GatewaySettings,
    LogSettings,
    MetricsSettings,
    OidcSettings,
    PoolSettings,
    ServeSettings,
    TracingSettings,
)

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
REFERENCE = DOCS / "reference"


def subclasses(error: type) -> set[type]:
    return {error}.union(*(subclasses(each) for each in error.__subclasses__()))


def codes(error: type) -> set[str]:
    """The codes of the classes that are raised: those without subclasses."""
    return {subclass.code for subclass in subclasses(error) if not subclass.__subclasses__()}


def first_column(page: Path, heading: str) -> set[str]:
    section = page.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return set(re.findall(r"^\| `([^`]+)`", section, re.MULTILINE))


def test_every_error_code_is_documented_and_every_documented_one_exists() -> None:
    page = REFERENCE / "errors.md"

    assert first_column(page, "Converting") == codes(convert.errors.ConvertError)
    serving = codes(serve.errors.ServeError) | ENGINE_CODES
    assert first_column(page, "Serving") == serving | {"server_error", "invalid_settings", "malformed_request"}


SETTINGS = [
    ServeSettings, PoolSettings, EngineSettings, GatewaySettings, AdmissionSettings, OidcSettings, MetricsSettings,
    LogSettings, TracingSettings,
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_setting_is_documented_and_every_documented_one_exists(settings: type[BaseModel]) -> None:
    assert first_column(REFERENCE / "settings.md", settings.__name__) == set(settings.model_fields)


def test_every_metric_is_documented_as_it_is_and_every_documented_one_exists() -> None:
    rows = re.findall(
        r"^\| `([^`]+)` \| (\w+) \| (.*?) \| (.*) \|$", (REFERENCE / "metrics.md").read_text(), re.MULTILINE
    )

    documented = {name: (kind, tuple(re.findall(r"`(\w+)`", labels)), meaning) for name, kind, labels, meaning in rows}
    assert documented == {
        metric.name: (metric.kind, () if metric in OF_EXPORTER else metric.labels, metric.help) for metric in ALL
    }
    assert len(rows) == len(ALL)


def test_the_page_of_the_command_line_is_what_the_commands_say() -> None:
    script = runpy.run_path(str(DOCS / "hooks" / "command_line.py"))

    assert (REFERENCE / "command-line.md").read_text() == script["page"](), "run: make docs"


PROGRAMS = {"convert": convert.cli.app.app, "serve": serve.cli.app.app}


def documented_commands() -> list[str]:
    """Every `python -m convert …` and `python -m serve …` in the code blocks and the inline code of the pages."""
    pages = [ROOT / "README.md", *(ROOT / "deploy").glob("*.md"), *DOCS.rglob("*.md")]
    texts = [page.read_text() for page in pages if page.name != "command-line.md"]
    command = r"python -m ((?:convert|serve) [a-z][^`\n|;]*)"
    return sorted({match.strip() for text in texts for match in re.findall(command, text)})


@pytest.mark.parametrize("command", documented_commands())
def test_every_command_and_option_of_the_pages_exists(command: str) -> None:
    program, *words = shlex.split(command, comments=True)

    result = CliRunner().invoke(PROGRAMS[program], [*words, "--help"])

    assert result.exit_code == 0, result.output


def test_every_public_route_is_documented() -> None:
    page = (REFERENCE / "api.md").read_text()

    assert [route for route in ENGINE_ROUTES if f"POST {route}`" not in page] == []


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.md")) + sorted(DOCS.rglob("*.md")), ids=lambda path: path.name)
def test_every_link_between_pages_leads_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", path.read_text())

    assert [link for link in links if "://" not in link and not (path.parent / link).exists()] == []


def test_the_site_has_no_dead_link_and_loads_nothing_from_another_host(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr

    loads = re.compile(r"<(?:script|img|iframe)[^>]*\ssrc=.?(?:https?:)?//|<link[^>]*\shref=.?(?:https?:)?//")
    assert [page for page in tmp_path.rglob("*.html") if loads.search(page.read_text())] == []


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
            key: figure["value"]
            for key, figure in json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())["figures"].items()
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


def test_targets_that_the_pages_name_are_targets_of_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    pages = {*ROOT.glob("*.md"), *DOCS.rglob("*.md")} - {ROOT / "CHANGELOG.md"}  # which names those of its time
    texts = [page.read_text() for page in pages]

    named = {name for text in texts for name in re.findall(r"(?:`|^)make ([a-z-]+)(?=[`\s])", text, re.MULTILINE)}
    assert named >= {"demo", "test"}
    assert named <= targets
