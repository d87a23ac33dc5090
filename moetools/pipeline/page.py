"""Self-contained HTML pages: no scripts, nothing to download, and all that is shown is escaped."""

from collections.abc import Sequence

from moetools.pipeline.table import Table
from moetools.printable import in_html

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
body { color: #1a1a1a; background: #fff; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; } .wide td, .wide th { overflow-wrap: normal; }
.panels { display: flex; flex-wrap: wrap; gap: .5rem 2rem; } .panels > * { max-width: 100%; min-width: 0; }
table { border-collapse: collapse; margin: .5rem 0; }
td, th { padding: .15rem .7rem; border-bottom: 1px solid #ddd; }
td { text-align: right; font-variant-numeric: tabular-nums; } td:first-child, th:first-child { text-align: left; }
svg { margin: .4rem 1rem .4rem 0; } svg text { font: 11px system-ui, sans-serif; } .note { color: #555; }
pre { background: #f4f4f4; padding: .6rem; overflow-x: auto; }
@media (prefers-color-scheme: dark) {
  body { color: #e6e6e6; background: #16181c; } td, th { border-color: #444; } .note { color: #a9a9a9; }
  pre { background: #23262c; } svg { background: #fff; border-radius: 4px; padding: 6px; }
}
"""


def html_page(title: str, parts: Sequence[str]) -> str:
    """The whole page.

    Args:
        title: plain text.
        parts: HTML of the body, one below the other.
    """
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{in_html(title)}</title>\n'
        f"<style>{_STYLE}</style></head><body><main>\n{body}\n</main></body></html>\n"
    )


def html_table(table: Table) -> str:
    """A heading, the table and its note."""
    head = "".join(f'<th scope="col">{in_html(column)}</th>' for column in table.columns)
    body = "".join("<tr>" + "".join(f"<td>{in_html(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    title, note = in_html(table.title), f"<p class=note>{in_html(table.note)}</p>" if table.note else ""
    whole = scrolled(f"<table><tr>{head}</tr>{body}</table>", f"table {title}")
    return f"<h2>{title}</h2>{whole}{note}"


def scrolled(wide: str, label: str) -> str:
    """HTML that may be wider than the page: it scrolls by itself, also by keyboard. `label` is escaped already."""
    return f'<div class="wide" tabindex="0" role="group" aria-label="{label}">{wide}</div>'
