"""The alerts: one source, tested by promtool, each with a page that says what to do."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from deploy.alerts.generate import DIRECTORY, OPERATOR, RULES, prometheus_rule, rules, with_runbooks_at

RUNBOOKS = Path(__file__).parents[2] / "docs" / "runbooks"
ALERTS = [rule for group in rules()["groups"] for rule in group["rules"] if "alert" in rule]

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None,
    reason="NO RULE IS TESTED: promtool is missing. It comes with Prometheus, not from PyPI. Debian and Ubuntu: "
    "apt-get install prometheus; else: https://prometheus.io/download",
)
TESTS = {
    name: yaml.safe_load((DIRECTORY / f"{name}_test.yaml").read_text())["tests"] for name in ("faults", "harmless")
}


def test_the_operator_gets_the_same_rules() -> None:
    assert OPERATOR.read_text() == prometheus_rule(), "python -m deploy.alerts.generate"
    assert yaml.safe_load(OPERATOR.read_text())["spec"] == rules()


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    pages = {page.stem for page in RUNBOOKS.glob("*.md")} - {"README"}

    assert {alert["alert"] for alert in ALERTS} == pages
    index = (RUNBOOKS / "README.md").read_text()
    assert all(f"[{page}]({page}.md)" in index for page in pages)


def test_every_alert_links_to_its_runbook_from_wherever_it_is_read() -> None:
    """A pager knows no repository: the link is absolute. Its host is the reader's own."""
    for alert in ALERTS:
        url = urlsplit(alert["annotations"]["runbook_url"])
        assert (url.scheme, bool(url.netloc)) == ("https", True)
        assert url.path.rpartition("/")[2] == f"{alert['alert']}.html"


def test_the_links_lead_to_a_site_of_ones_own_after_one_command() -> None:
    text = with_runbooks_at("https://docs.example.org/graft/runbooks/", RULES.read_text())

    urls = re.findall(r"runbook_url: (\S+)", text)
    assert len(urls) == len(ALERTS)
    assert {url.rpartition("/")[0] for url in urls} == {"https://docs.example.org/graft/runbooks"}
    assert yaml.safe_load(text)["groups"][0] == rules()["groups"][0]


def test_every_alert_says_how_urgent_it_is_and_about_what() -> None:
    assert {alert["labels"]["severity"] for alert in ALERTS} == {"page", "ticket"}
    assert all(alert["annotations"]["summary"] for alert in ALERTS)


@needs_promtool
def test_promtool_takes_the_rules() -> None:
    result = subprocess.run(["promtool", "check", "rules", "rules.yaml"], cwd=DIRECTORY, capture_output=True, text=True)

    assert result.returncode == 0, result.stderr


@needs_promtool
@pytest.mark.parametrize("name", TESTS)
def test_alerts_fire_for_their_fault_and_for_nothing_else(name: str) -> None:
    result = subprocess.run(
        ["promtool", "test", "rules", f"{name}_test.yaml"], cwd=DIRECTORY, capture_output=True, text=True
    )

    assert result.returncode == 0, result.stdout + result.stderr


def test_every_alert_is_tested() -> None:
    tested = (DIRECTORY / "faults_test.yaml").read_text()

    for alert in ALERTS:
        fires = f'alertname="{alert["alert"]}", severity="{alert["labels"]["severity"]}"'
        assert fires in tested, fires


def test_what_is_harmless_fires_nothing_and_has_what_the_alerts_ask_for() -> None:
    """A test in which a metric is missing would be silent whatever happens."""
    asked = set(re.findall(r"(?:graft|vllm|DCGM)[\w:]+", " ".join(alert["expr"] for alert in ALERTS)))
    shown = {re.split(r"[{]", series["series"])[0] for test in TESTS["harmless"] for series in test["input_series"]}

    assert len(TESTS["harmless"]) >= 10
    assert all(check["exp_samples"] == [] for test in TESTS["harmless"] for check in test["promql_expr_test"])
    recorded = {rule["record"] for group in rules()["groups"] for rule in group["rules"] if "record" in rule}
    assert asked - shown - recorded == set()
