"""What is asked of `compare`."""

from dataclasses import dataclass
from pathlib import Path

from moetools.arguments import OUTPUT, option
from moetools.verbs.plots_option import plots_option


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What is asked of `compare`."""

    reference: Path | None = option(
        None, "The original: every model's KL divergence from it is measured.", metavar="MODEL", path="reads"
    )
    html: Path | None = option(
        None,
        "Also write the comparison as one self-contained page; a file that is there is replaced.",
        metavar="FILE.html",
        panel=OUTPUT,
        path="writes",
    )
    plots: Path | None = plots_option()
