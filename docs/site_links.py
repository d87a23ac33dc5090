"""For the site only: links that lead out of docs/, to files of the repository, become their names."""

import posixpath
import re
from typing import Any

_LINK = re.compile(r"\[([^\]]+)\]\(([^)#\s]+)[^)]*\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs with the text of every page."""
    folder = posixpath.dirname(page.file.src_uri)

    def replaced(link: "re.Match[str]") -> str:
        outside = posixpath.normpath(posixpath.join(folder, link[2])).startswith("..")
        return link[1] if outside else link[0]

    return _LINK.sub(replaced, markdown)
