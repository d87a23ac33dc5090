"""Self-contained HTML pages: nothing to download, all that is shown is escaped, and one script, which sorts tables.

The page's own policy lets a browser run that script alone, known by its digest, and load nothing.
"""

import base64
import os
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from moetools.checkpoint.output import check_apart
from moetools.errors import UserError
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
th button { font: inherit; font-weight: bold; color: inherit; background: none; border: 0; padding: 0; }
th button { cursor: pointer; }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
td { text-align: right; font-variant-numeric: tabular-nums; } td:first-child, th:first-child { text-align: left; }
svg { margin: .4rem 1rem .4rem 0; } svg text { font: 11px system-ui, sans-serif; } .note { color: #555; }
pre { background: #f4f4f4; padding: .6rem; overflow-x: auto; }
@media (prefers-color-scheme: dark) {
  body { color: #e6e6e6; background: #16181c; } td, th { border-color: #444; } .note { color: #a9a9a9; }
  pre { background: #23262c; } svg { background: #fff; border-radius: 4px; padding: 6px; }
}
"""

_SCRIPT = """
const value = (row, column) => row.cells[column] ? row.cells[column].textContent.trim() : "";
const units = {k: 1e3, M: 1e6, G: 1e9, T: 1e12};
const number = text => {
  const found = /^(-?[\\d,.]+(?:e[-+]?\\d+)?)\\s*([kMGT]?)B?[%x]?$/.exec(text);
  return found ? Number(found[1].replace(/,/g, "")) * (units[found[2]] || 1) : NaN;
};
const compare = (one, other) => {
  const [left, right] = [number(one), number(other)];
  if (!isNaN(left) && !isNaN(right)) return left - right;
  if (isNaN(left) !== isNaN(right)) return isNaN(left) ? 1 : -1;
  return one.localeCompare(other);
};
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, table = head.closest("table"), column = head.cellIndex;
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentElement.cells) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows];
    rows.sort((one, other) => (down ? -1 : 1) * compare(value(one, column), value(other, column)));
    table.tBodies[0].append(...rows);
  });
}
"""
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; "
    f"script-src 'sha256-{base64.b64encode(sha256(_SCRIPT.encode()).digest()).decode()}'"
)


def check_page(page: Path, reads: Mapping[str, Path]) -> None:
    """Whether a page can be written, before anything is measured.

    Raises:
        UserError: no such folder, a folder, or a file that the run reads.
    """
    if page.is_dir():
        raise UserError(f"`html={page}` is a folder", hint="name a file, such as comparison.html")
    folder = page.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"`html={page}`: the folder '{folder}' is missing or cannot be written to")
    if page.suffix not in (".html", ".htm"):
        raise UserError(f"`html={page}` does not end in .html", hint=f"`html={page}.html`")
    check_apart({"`html`": page}, reads)


def html_page(title: str, parts: Sequence[str]) -> str:
    """The whole page.

    Args:
        title: plain text.
        parts: HTML of the body, one below the other.
    """
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{in_html(title)}</title>\n'
        f"<style>{_STYLE}</style></head><body><main>\n{body}\n</main><script>{_SCRIPT}</script></body></html>\n"
    )


def html_table(table: Table) -> str:
    """A heading, the table and its note."""
    head = "".join(
        f'<th scope="col" aria-sort="none"><button type="button">{in_html(one)}</button></th>' if one else "<td></td>"
        for one in table.columns
    )
    body = "".join("<tr>" + "".join(f"<td>{in_html(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    title, note = in_html(table.title), f"<p class=note>{in_html(table.note)}</p>" if table.note else ""
    whole = scrolled(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>", f"table {title}")
    return f"<h2>{title}</h2>{whole}{note}"


def scrolled(wide: str, label: str) -> str:
    """HTML that may be wider than the page: it scrolls by itself, also by keyboard. `label` is escaped already."""
    return f'<div class="wide" tabindex="0" role="group" aria-label="{label}">{wide}</div>'
