"""A comparison as JSON, for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from convert.pipeline.comparison.rows import Comparison, Row
from convert.quality import Answer

SCHEMA = "graft.comparison/1"


def comparison_document(comparison: Comparison) -> dict[str, Any]:
    """Everything that the page shows, in types that JSON has."""
    return {
        "schema": SCHEMA,
        "name": comparison.name,
        "origin": comparison.origin.model_dump(mode="json"),
        "base": comparison.base.model_dump(mode="json") if comparison.base else None,
        "chosen": comparison.chosen.label if comparison.chosen else None,
        "answers_as_trained": _answers(comparison.answers),
        "rows": [_row(row) for row in comparison.rows],
        "versions": dict(comparison.versions or {}),
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        "label": row.label,
        "command": row.command,
        "route": row.route,
        "quantization": row.quantization,
        "size_bytes": row.size_bytes,
        "decode_tokens_per_s": row.decode_tokens_per_s,
        "quality": row.quality.model_dump(mode="json"),
        "passes": row.passes,
        "failures": list(row.failures),
        "chosen": row.chosen,
        "recovery": row.recovery.model_dump(mode="json") if row.recovery else None,
        "retention_by_module": [asdict(tensor) for tensor in row.retained.tensors] if row.retained else None,
        "answers": _answers(row.answers),
    }


def _answers(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    return [
        {
            "messages": list(answer.canary.messages),
            "expect": answer.canary.expect,
            "answer": answer.text,
            "passed": answer.passed,
        }
        for answer in answers
    ]
