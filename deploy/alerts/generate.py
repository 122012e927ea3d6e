"""Write prometheus-rule.yaml, which is rules.yaml for the Prometheus operator.

python -m deploy.alerts.generate
python -m deploy.alerts.generate --runbooks https://HOST/PATH     alerts link to the runbooks of your copy of the pages
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import yaml

DIRECTORY = Path(__file__).parent
RULES, OPERATOR = DIRECTORY / "rules.yaml", DIRECTORY / "prometheus-rule.yaml"
_HEAD = "# Made from rules.yaml by `python -m deploy.alerts.generate`.\n"
_RUNBOOK_URL = re.compile(r"(?<=runbook_url: )\S+(?=/\w+\.html$)", re.MULTILINE)


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


def with_runbooks_at(url: str, text: str) -> str:
    """The rules with links to the pages below `url`."""
    return _RUNBOOK_URL.sub(url.rstrip("/"), text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runbooks", metavar="URL", help="where your copy of the site has the folder runbooks")
    if url := parser.parse_args().runbooks:
        RULES.write_text(with_runbooks_at(url, RULES.read_text()))
        print(RULES)
    OPERATOR.write_text(prometheus_rule())
    print(OPERATOR)


if __name__ == "__main__":
    main()
