"""A page for people: what every command shows is made of these."""

from __future__ import annotations

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from convert.detect import Training

Page = tuple[RenderableType, ...]

TRAINING = {
    Training.LORA: "LoRA (trained on full-precision weights)",
    Training.QLORA: "QLoRA (trained on 4-bit weights)",
    Training.UNKNOWN: "unknown: LoRA or QLoRA",
}


def print_page(page: Page) -> None:
    """Lines of text are never cut or broken: there are commands in them, to be copied."""
    console = Console(highlight=False)
    for part in page:
        console.print(part, soft_wrap=isinstance(part, Text))


def facts_table() -> Table:
    """Two columns: what, and its value."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    return table
