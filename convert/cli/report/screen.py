"""What the screens of all commands have in common."""

from __future__ import annotations

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from convert.detection.training import Training

Page = tuple[RenderableType, ...]

_TRAINING = {
    Training.LORA: "LoRA (trained on full-precision weights)",
    Training.QLORA: "QLoRA (trained on 4-bit weights)",
    Training.UNKNOWN: "unknown: LoRA or QLoRA",
}


def training_words(training: Training, confidence: str | None) -> str:
    """How an adapter was trained; a measured answer is said to be one, with its figure."""
    words = _TRAINING[training]
    return f"{words}: measured, {confidence}; no file says it" if confidence else words


def print_screen(page: Page) -> None:
    """Print tables in the width of the terminal, and lines of text unbroken: a command in a line can be copied."""
    console = Console(highlight=False)
    for part in page:
        console.print(part, soft_wrap=isinstance(part, Text))


def facts_table() -> Table:
    """Two columns: a name and its value, of which nothing is cut off, however long a path is."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table
