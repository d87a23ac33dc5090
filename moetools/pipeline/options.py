"""How an output is written; imports no torch, so that the command line can show the options."""

from dataclasses import dataclass
from pathlib import Path

from moetools.arguments import OUTPUT, option


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How an output is written, the same for every verb.

    Attributes:
        outline: in a dry run, a folder to put config.json and headers of the output into, where they are known before
            it is made.
    """

    overwrite: bool = option(
        False,
        "Replace `out` if it is a checkpoint, and throw away what an interrupted run left.",
        panel=OUTPUT,
    )
    resume: bool = option(False, "Go on from the last finished layer of an interrupted run.", panel=OUTPUT)
    dry_run: bool = option(
        False,
        "Check everything and show sizes, memory and time; write nothing. The time is told from the first layers, made "
        "on a little of the text.",
        panel=OUTPUT,
    )
    verify: bool = option(
        True,
        "Reload `out` with stock transformers and compare it with what was meant.",
        flags="--verify/--no-verify",
        panel=OUTPUT,
    )
    outline: Path | None = None
