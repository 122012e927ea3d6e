"""Every query of every dashboard, also of the marks in its panels, run on a Prometheus."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from examples.observe.prometheus import Prometheus

DASHBOARDS = Path("deploy/dashboards")


@dataclass(frozen=True)
class PanelQuery:
    board: str
    panel: str
    expression: str  # as Grafana sends it, every variable on "All"

    def __str__(self) -> str:
        return f"{self.board}: {self.panel}: {self.expression}"


def panel_queries(rate_interval: str = "1m") -> Iterator[PanelQuery]:
    for path in sorted(DASHBOARDS.glob("*.json")):
        board = json.loads(path.read_text())
        for mark in board["annotations"]["list"]:
            yield PanelQuery(path.stem, mark["name"], plain(mark["expr"], rate_interval))
        for panel in board["panels"]:
            for target in panel.get("targets") or ():
                yield PanelQuery(path.stem, panel["title"], plain(target["expr"], rate_interval))


def plain(expression: str, rate_interval: str) -> str:
    filled = expression.replace("$__rate_interval", rate_interval)
    return re.sub(r"\$(namespace|model|replica|adapter)\b", ".*", filled)


def without_data(prometheus: Prometheus, seconds: float) -> list[PanelQuery]:
    """The queries that have no data in the last `seconds`, without those of NVIDIA's exporter, which isn't run here."""
    queries = [query for query in panel_queries() if "DCGM_" not in query.expression]
    return [query for query in queries if not prometheus.query_range(query.expression, seconds, step_s=5)]
