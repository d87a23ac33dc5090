"""The pictures of a page as files of their own: SVG as the page draws them, and PNG of that.

PNG is drawn by vl-convert (Vega's renderer, with fonts of its own; no browser), the extra `plots`.
"""

import html
import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from moetools.checkpoint.durable import sync_folder, sync_tree, write_durably
from moetools.checkpoint.output import check_apart
from moetools.errors import CheckpointError, UserError
from moetools.pipeline.page import check_page

_PICTURE = re.compile(r"<svg (?P<size>.*?)>(?P<drawn>.*?)</svg>", re.DOTALL)
_LABEL = re.compile(r'aria-label="(.*?)"')
_ALONE = '<style>text { font: 11px system-ui, sans-serif; }</style><rect width="100%" height="100%" fill="#fff"/>'
"""What the page gives a picture, which a file must bring along."""
_NAME_LENGTH = 60
_SCALE = 2
"""Pixels of a PNG per unit of the picture."""


def check_shown(page: Path | None, plots: Path | None, reads: Mapping[str, Path]) -> None:
    """Whether a page and a folder of its pictures can be written, before anything is measured.

    Raises:
        UserError: no such folder, one with something in it, something that the run reads, no vl-convert.
    """
    if page is not None:
        check_page(page, reads)
    if plots is None:
        return
    folder = plots.absolute().parent
    if plots.exists() and not plots.is_dir():
        raise UserError(f"`plots={plots}` is a file", hint="name a folder that is new or empty")
    if plots.is_dir() and any(plots.iterdir()):
        raise UserError(f"`plots={plots}`: the folder is not empty", hint="name one that is new or empty")
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"`plots={plots}`: the folder '{folder}' is missing or cannot be written to")
    if importlib.util.find_spec("vl_convert") is None:
        raise UserError("`plots` needs the package vl-convert-python", hint="pip install 'moetools[plots]'")
    check_apart({"`plots`": plots} | ({} if page is None else {"`html`": page}), reads)


def write_shown(page: Path | None, plots: Path | None, text: Callable[[], str]) -> None:
    """Write the page and the folder of its pictures, each if it is asked for.

    Args:
        text: makes the page.

    Raises:
        CheckpointError: disk full or failing; the folder of pictures is then not there.
    """
    if page is None and plots is None:
        return
    made = text()
    if page is not None:
        write_durably(page, made.encode())
    if plots is not None:
        _write_plots(plots, made)


def _write_plots(folder: Path, page: str) -> None:
    import vl_convert

    staged = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        for name, svg in pictures(page):
            (staged / f"{name}.svg").write_text(svg, encoding="utf-8")
            (staged / f"{name}.png").write_bytes(vl_convert.svg_to_png(svg, scale=_SCALE))
        sync_tree(staged)
        # Replaces an empty folder in one step.
        staged.rename(folder)
        sync_folder(folder.absolute().parent)
    except OSError as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise CheckpointError(f"cannot write the plots '{folder}': {error}") from error


def pictures(page: str) -> Iterator[tuple[str, str]]:
    """(name, SVG document) of every picture of a page, in its order; names come from the pictures' labels."""
    taken: set[str] = set()
    for number, found in enumerate(_PICTURE.finditer(page), 1):
        label = _LABEL.search(found["size"])
        words = re.findall(r"\w+", html.unescape(label[1]).lower()) if label else []
        name = "-".join(words)[:_NAME_LENGTH].strip("-") or "plot"
        if name in taken:
            name = f"{name}-{number}"
        taken.add(name)
        yield name, f'<svg xmlns="http://www.w3.org/2000/svg" {found["size"]}>{_ALONE}{found["drawn"]}</svg>\n'
