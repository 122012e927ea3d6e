"""Write the dashboards as the JSON that Grafana imports.

python -m deploy.dashboards.generate
"""

from __future__ import annotations

import json
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.dashboards.adapters import adapters
from deploy.dashboards.capacity import capacity
from deploy.dashboards.engine import engine
from deploy.dashboards.overview import overview

DIRECTORY = Path(__file__).parent
BOARDS = {"overview": overview, "adapters": adapters, "engine": engine, "capacity": capacity}


def documents() -> dict[str, str]:
    """Every dashboard's JSON by its file's name."""
    return {
        f"{name}.json": json.dumps(make().build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"
        for name, make in BOARDS.items()
    }


if __name__ == "__main__":
    for file, text in documents().items():
        (DIRECTORY / file).write_text(text)
        print(DIRECTORY / file)
