"""Ways that were made and measured, side by side: one page for people, one document for programs.

rows       what is compared
document   all of it as JSON
picture    size against loss against speed; retention by layer
page       one HTML file that needs nothing else
"""

from convert.comparison.document import comparison_document
from convert.comparison.page import comparison_page
from convert.comparison.rows import Comparison, Row

__all__ = ["Comparison", "Row", "comparison_document", "comparison_page"]
