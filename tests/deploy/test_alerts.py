"""The alerts: one source, tested by promtool, each with a page that says what to do."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from deploy.alerts.generate import DIRECTORY, OPERATOR, prometheus_rule, rules

RUNBOOKS = Path(__file__).parents[2] / "docs" / "runbooks"
ALERTS = [rule for group in rules()["groups"] for rule in group["rules"] if "alert" in rule]

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None,
    reason="promtool comes with Prometheus (apt-get install prometheus), not from PyPI",
)


def test_the_operator_gets_the_same_rules() -> None:
    assert OPERATOR.read_text() == prometheus_rule(), "python -m deploy.alerts.generate"
    assert yaml.safe_load(OPERATOR.read_text())["spec"] == rules()


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    pages = {page.stem for page in RUNBOOKS.glob("*.md")} - {"README"}

    assert {alert["alert"] for alert in ALERTS} == pages
    assert all(alert["annotations"]["runbook"] == f"docs/runbooks/{alert['alert']}.md" for alert in ALERTS)
    index = (RUNBOOKS / "README.md").read_text()
    assert all(f"[{page}]({page}.md)" in index for page in pages)


def test_every_alert_says_how_urgent_it_is_and_about_what() -> None:
    assert {alert["labels"]["severity"] for alert in ALERTS} == {"page", "ticket"}
    assert all(alert["annotations"]["summary"] for alert in ALERTS)


@needs_promtool
def test_promtool_takes_the_rules() -> None:
    result = subprocess.run(["promtool", "check", "rules", "rules.yaml"], cwd=DIRECTORY, capture_output=True, text=True)

    assert result.returncode == 0, result.stderr


@needs_promtool
def test_alerts_fire_for_their_fault_and_for_nothing_else() -> None:
    result = subprocess.run(
        ["promtool", "test", "rules", "rules_test.yaml"], cwd=DIRECTORY, capture_output=True, text=True
    )

    assert result.returncode == 0, result.stdout + result.stderr


def test_every_alert_is_tested() -> None:
    tested = (DIRECTORY / "rules_test.yaml").read_text()

    for alert in ALERTS:
        fires = f'alertname="{alert["alert"]}", severity="{alert["labels"]["severity"]}"'
        assert fires in tested, fires
