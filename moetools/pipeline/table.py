"""How a verb's result asks to be shown; the command line draws it without knowing the verb."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """One table of a result.

    Attributes:
        title: a short heading; may be empty.
        columns: headings.
        rows: cells as text, already formatted with their units; every row has one cell per column.
        note: what a reader must know to read the numbers; may be empty.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            assert len(row) == len(self.columns), (
                f"table '{self.title}': {len(row)} cells in {len(self.columns)} columns"
            )
