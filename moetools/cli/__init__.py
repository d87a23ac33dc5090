"""The command line: a thin Typer app over `moetools.verbs`. `console.py` is the only place that prints."""

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code; `argv` defaults to the process's own arguments."""
    import sys

    from moetools.cli.app import run

    sys.exit(run(sys.argv[1:] if argv is None else list(argv)))
