"""Measures what a conversion lost: the next-token distributions of the result against those of the function as trained,
on held-out text. docs/explanation/quality.md says what each figure means; one decoder layer is in memory at a time.
"""

from convert.inputs.chat.tokenizer import Tokenizer
from convert.quality.canaries import Answer, Canary, open_canaries, require_passed
from convert.quality.examination import Examination, examine, measure
from convert.quality.gate import DEFAULT_GATE, Gate, choosing_gate
from convert.quality.golden import collect_golden, write_golden
from convert.quality.models.float32_model import load
from convert.quality.models.memory import measuring_bytes
from convert.quality.models.peft_reference import require_applicable
from convert.quality.reference import Reference, compute_reference
from convert.quality.retention import ModelRetention, measure_retention
from convert.quality.text import Text
from convert.quality.tokenized_text import MAX_TOKENS, TokenizedText, token_rows, tokenize

__all__ = [
    "DEFAULT_GATE",
    "MAX_TOKENS",
    "Answer",
    "Canary",
    "Examination",
    "Gate",
    "ModelRetention",
    "Reference",
    "Text",
    "TokenizedText",
    "Tokenizer",
    "choosing_gate",
    "collect_golden",
    "compute_reference",
    "examine",
    "load",
    "measure",
    "measure_retention",
    "measuring_bytes",
    "open_canaries",
    "require_applicable",
    "require_passed",
    "token_rows",
    "tokenize",
    "write_golden",
]
