"""Measures what a conversion lost: the next-token distributions of the result against those of the function as trained,
on held-out text. docs/explanation/quality.md says what each figure means; one decoder layer is in memory at a time.
"""

from convert.inputs.chat.tokenizer import Tokenizer
from convert.quality.canaries import ANSWER_TOKENS, Answer, Canary, open_canaries, prompts_of, require_passed
from convert.quality.examination import Examination, examine, measure
from convert.quality.gate import DEFAULT_GATE, Gate, choosing_gate
from convert.quality.golden import collect_golden, write_golden
from convert.quality.models.float32_model import load
from convert.quality.models.memory import MeasuredModels
from convert.quality.models.peft_reference import require_applicable
from convert.quality.reference import Reference, compute_reference
from convert.quality.retention import ModelRetention, measure_retention
from convert.quality.text import Text
from convert.quality.tokenized_text import TokenizedText, token_rows, tokenize

__all__ = [
    "ANSWER_TOKENS",
    "DEFAULT_GATE",
    "Answer",
    "Canary",
    "Examination",
    "Gate",
    "MeasuredModels",
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
    "open_canaries",
    "prompts_of",
    "require_applicable",
    "require_passed",
    "token_rows",
    "tokenize",
    "write_golden",
]
