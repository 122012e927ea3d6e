"""Write prometheus-rule.yaml, which is rules.yaml for the Prometheus operator.

python -m deploy.alerts.generate
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

DIRECTORY = Path(__file__).parent
RULES, OPERATOR = DIRECTORY / "rules.yaml", DIRECTORY / "prometheus-rule.yaml"
_HEAD = "# Made from rules.yaml by `python -m deploy.alerts.generate`.\n"


def rules() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(RULES.read_text())
    return document


def prometheus_rule() -> str:
    """The PrometheusRule of the same rules."""
    document = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "graft", "labels": {"app.kubernetes.io/name": "graft"}},
        "spec": rules(),
    }
    text: str = yaml.safe_dump(document, sort_keys=False, width=1000)
    return _HEAD + text


if __name__ == "__main__":
    OPERATOR.write_text(prometheus_rule())
    print(OPERATOR)
