"""Usual messages of the model libraries, which say nothing about a conversion and are not shown.

A message is named by its logger and by its text. Every other warning of a library is an event, and is shown.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

_ENVIRONMENT = {
    # The progress bars of transformers would break up those of `convert`.
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


@dataclass(frozen=True)
class _UsualMessage:
    """The beginning of a message of one logger, before its arguments are filled in."""

    logger: str
    text: str

    def __call__(self, record: logging.LogRecord) -> bool:
        """As a filter of the logger: whether the record is to be shown."""
        return not str(record.msg).startswith(self.text)


_USUAL_MESSAGES = (
    # The package `kernels` is not installed: bitsandbytes then multiplies 4-bit weights with its own code.
    _UsualMessage("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community"),
    # A row of text is longer than the model's context: it is cut after it was turned into token ids.
    _UsualMessage("transformers.tokenization_utils_base", "Token indices sequence length is longer than the specified"),
)


def hide_usual_messages() -> None:
    """Call before transformers and bitsandbytes are imported: both read or log their settings at import."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for message in _USUAL_MESSAGES:
        logging.getLogger(message.logger).addFilter(message)
