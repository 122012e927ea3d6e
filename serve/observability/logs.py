"""Logs of a replica: one JSON document a line, or text for people."""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TextIO

from serve.settings import LogSettings

_FILE_BYTES, _FILES = 32 << 20, 4
_KEPT = 40
# Attributes that the logging module itself gives a record; all others are fields of Graft's.
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "vllm_process_name"}


class JsonLines(logging.Formatter):
    """Time (UTC), level, logger, message, and every field of `extra`."""

    def __init__(self, **constant: str) -> None:
        super().__init__()
        self._constant = constant

    def format(self, record: logging.LogRecord) -> str:
        document: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._constant,
            **fields_of(record),
        }
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        return json.dumps(document, default=str, ensure_ascii=False)


class TextLines(logging.Formatter):
    """Time, level and message, and the fields as NAME=VALUE."""

    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{name}={value}" for name, value in fields_of(record).items() if name != "event")
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = f"{when} {record.levelname} {record.getMessage()} {fields}".rstrip()
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _remove_old(directory: Path) -> None:
    """Remove the oldest files: every replica that ever ran has left one."""
    files = sorted(directory.glob("*.log*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in files[_KEPT:]:
        path.unlink(missing_ok=True)


def fields_of(record: logging.LogRecord) -> dict[str, object]:
    """The fields given as `extra`, without those that are None."""
    return {
        name: value
        for name, value in vars(record).items()
        if name not in _OWN and not name.startswith("_") and value is not None
    }


def set_up(settings: LogSettings, replica: str) -> None:
    """Send the logs of this package where the settings say, and vLLM's to the stream in the same format. Called once in
    a process; VLLM_CONFIGURE_LOGGING=0 keeps vLLM from setting up its own."""
    formatter = JsonLines(replica=replica) if settings.format == "json" else TextLines()
    stream, problem = _stream(settings.stream)
    handler: logging.Handler = logging.StreamHandler(stream)
    if settings.directory:
        settings.directory.mkdir(parents=True, exist_ok=True)
        _remove_old(settings.directory)
        path = settings.directory / f"{replica}.log"
        handler = RotatingFileHandler(path, maxBytes=_FILE_BYTES, backupCount=_FILES, encoding="utf-8")
    _send(logging.getLogger("serve"), handler, formatter, logging.INFO)
    level = os.environ.get("VLLM_LOGGING_LEVEL", "WARNING").upper()
    _send(logging.getLogger("vllm"), logging.StreamHandler(stream), formatter, level)
    if problem:
        logging.getLogger(__name__).warning("logs go to the standard error stream: %s", problem)


def _stream(path: Path | None) -> tuple[TextIO, OSError | None]:
    """What to write lines to, and why it isn't `path`: a replica without its logs is better than none."""
    if path is None:
        return sys.stderr, None
    try:
        # Another process may write to it too: a line at a time, appended.
        return path.open("a", buffering=1, encoding="utf-8"), None
    except OSError as error:
        return sys.stderr, error


def _send(logger: logging.Logger, handler: logging.Handler, formatter: logging.Formatter, level: int | str) -> None:
    handler.setFormatter(formatter)
    logger.handlers = [handler]
    logger.setLevel(level)
    logger.propagate = False
