"""Route variants that were built and measured, side by side: one page for people, one document for programs.

Entry points: `comparison_page`, an HTML file, and `comparison_document`, the same as JSON. Both take a `Comparison`.
"""

from convert.pipeline.comparison.document import comparison_document
from convert.pipeline.comparison.page import comparison_page
from convert.pipeline.comparison.rows import Comparison, Row

__all__ = ["Comparison", "Row", "comparison_document", "comparison_page"]
