"""The commands of a page of the documentation, as a reader finds them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class CodeBlock:
    heading: str
    language: str
    code: str


def code_blocks(page: Path) -> Iterator[CodeBlock]:
    """Every fenced block of a page in order, with the heading that it stands under."""
    heading, fence, lines = "", "", []
    for line in page.read_text().splitlines():
        if fence and line.strip() == "```":
            yield CodeBlock(heading, fence.removeprefix("```"), "\n".join(lines) + "\n")
            fence, lines = "", []
        elif fence:
            lines.append(line)
        elif re.match(r"```\w+$", line):
            fence = line
        elif line.startswith("#"):
            heading = line.lstrip("# ")


def documents_in(output: str) -> list[Any]:
    """Every JSON document in what was printed, with anything around them."""
    documents, start = [], output.find("{")
    while start >= 0:
        try:
            document, end = json.JSONDecoder().raw_decode(output, start)
            documents.append(document)
        except json.JSONDecodeError:  # a brace of something else
            end = start + 1
        start = output.find("{", end)
    return documents


def shell_blocks(page: Path, language: str = "bash") -> list[CodeBlock]:
    return [block for block in code_blocks(page) if block.language == language]
