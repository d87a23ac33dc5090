"""A table of results, free of torch and of any way to print it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Rows of text under a title; the command line renders it.

    Attributes:
        note: a line below the table; empty for none.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""
