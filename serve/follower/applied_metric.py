"""Tells the exporter of metrics whether adapters.yaml was applied: otherwise only a line in a log would say it."""

from __future__ import annotations

import logging
from pathlib import Path

from convert.artifact.durable_files import replace_file
from serve.observability.exporter import TEXT_SUFFIX
from serve.observability.metrics import ADAPTERS_FILE_APPLIED

logger = logging.getLogger(__name__)


class AppliedMetric:
    """A file in the exporter's `directory`; nothing is written where there is none."""

    def __init__(self, directory: Path | None) -> None:
        self._path = directory / f"adapters-file{TEXT_SUFFIX}" if directory else None
        self._written: bool | None = None

    def write(self, is_applied: bool) -> None:
        """Raises nothing: a metric that can't be written is no reason not to follow the file."""
        if self._path is None or self._written is is_applied:
            return
        spec = ADAPTERS_FILE_APPLIED
        text = f"# HELP {spec.name} {spec.help}\n# TYPE {spec.name} {spec.kind}\n{spec.name} {float(is_applied)}\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self._path, text.encode())
        except OSError:
            logger.debug("could not write %s", self._path, exc_info=True)
        else:
            self._written = is_applied
