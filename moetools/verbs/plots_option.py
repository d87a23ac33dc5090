"""The option that says where the pictures of a page go; imports no torch."""

from typing import Any

from moetools.arguments import OUTPUT, option


def plots_option(page: str = "the page") -> Any:
    """The field `plots` of every verb whose page has pictures."""
    return option(
        None,
        f"Also write every picture of {page} as SVG and PNG into a folder that is new or empty.",
        metavar="DIR",
        panel=OUTPUT,
        path="writes",
    )
