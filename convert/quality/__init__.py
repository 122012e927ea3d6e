"""What a result lost: its next-token distributions against those of the function as trained, on held-out text.

    text, canaries   what is asked of every result: rows, and questions with what their answers must hold
    reference        the function as trained over all of it, and the base alone; kept small, and exactly
    examine          the written files, read back and compared
    retention        how much of the adapter's delta is in the written weights
    golden           what a server of the artifact is compared with later
    gate             which losses publish nothing

There is one model in memory at a time, in float32. docs/quality.md tells what each figure means.
"""

from convert.quality.canaries import Answer, Canary, open_canaries
from convert.quality.examine import Examination, examine, measure
from convert.quality.gate import Gate
from convert.quality.golden import golden, golden_bytes, write_golden
from convert.quality.model import load
from convert.quality.reference import Reference, reference
from convert.quality.retention import Retained, TensorRetention, retention, tensor_retention
from convert.quality.rows import token_rows
from convert.quality.text import DEFAULT_TEXT, Text
from convert.quality.tokenizer import Tokenizer

__all__ = [
    "DEFAULT_TEXT",
    "Answer",
    "Canary",
    "Examination",
    "Gate",
    "Reference",
    "Retained",
    "TensorRetention",
    "Text",
    "Tokenizer",
    "examine",
    "golden",
    "golden_bytes",
    "load",
    "measure",
    "open_canaries",
    "reference",
    "retention",
    "tensor_retention",
    "token_rows",
    "write_golden",
]
