"""Self-contained HTML pages: no scripts, nothing to download, and all that is shown is escaped."""

from collections.abc import Sequence

from moetools.pipeline.table import Table
from moetools.printable import in_html

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; margin: .5rem 0; } td, th { padding: .15rem .7rem; border-bottom: 1px solid #ddd; }
td { text-align: right; font-variant-numeric: tabular-nums; } td:first-child, th:first-child { text-align: left; }
svg { margin: .4rem 1rem .4rem 0; } svg text { font: 11px system-ui, sans-serif; } p.note { color: #555; }
pre { background: #f4f4f4; padding: .6rem; overflow-x: auto; }
"""


def html_page(title: str, parts: Sequence[str]) -> str:
    """The whole page.

    Args:
        title: plain text.
        parts: HTML of the body, one below the other.
    """
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{in_html(title)}</title>\n'
        f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def html_table(table: Table) -> str:
    """A heading, the table and its note."""
    head = "".join(f"<th>{in_html(column)}</th>" for column in table.columns)
    body = "".join("<tr>" + "".join(f"<td>{in_html(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    note = in_html(table.note)
    return f"<h2>{in_html(table.title)}</h2><table><tr>{head}</tr>{body}</table><p class=note>{note}</p>"
