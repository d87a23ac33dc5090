"""The Typer app: which commands there are, and what a usage error looks like."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from moetools import __version__
from moetools.cli.commands import make_command
from moetools.cli.console import BAD_USAGE, INTERRUPTED, print_error, print_line
from moetools.verbs.catalogue import VERBS

EXIT_CODES = (
    "Exit codes: 0 done, 1 failed, 2 bad usage, 3 verification failed or a gate missed, "
    "130 stopped by Ctrl-C, 143 stopped by SIGTERM."
)
# Typer exports no base class of its usage errors.
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[2]
COMMANDS: dict[str, Callable[..., None]] = {verb.name: make_command(verb) for verb in VERBS}

app = typer.Typer(
    no_args_is_help=True,
    epilog=EXIT_CODES,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
for name, command in COMMANDS.items():
    app.command(name, epilog=EXIT_CODES)(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print_line(f"moetools {__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Make trained Mixture-of-Experts checkpoints cheaper to serve, and measure what it cost.

    Results go to stdout (a table, or JSON with --json), progress and errors to stderr.
    """


def run(argv: Sequence[str]) -> int:
    """The exit code of `moetools ARGV`.

    Commands handle their own errors; what arrives here is a wrong command line, or Ctrl-C before a command began.
    """
    longer = [name for name in COMMANDS if argv and name.startswith(f"{argv[0]}-")]
    if longer and argv[0] not in COMMANDS:
        print_error(f"no such command '{argv[0]}'", hint=f"did you mean {' or '.join(longer)}?")
        return BAD_USAGE
    try:
        code = typer.main.get_command(app).main(
            args=list(argv), prog_name="moetools", standalone_mode=False, obj=list(argv)
        )
    except USAGE_ERROR as error:
        return _usage_error(error)
    except (KeyboardInterrupt, typer.Abort):
        print_error("interrupted")
        return INTERRUPTED
    return code if isinstance(code, int) else 0


def _usage_error(error: Any) -> int:
    message: str = error.format_message().strip()
    # A command without any argument has just shown its help.
    if message and type(error).__name__ != "NoArgsIsHelpError":
        context = getattr(error, "ctx", None)
        print_error(message, hint=f"{context.command_path if context else 'moetools'} --help")
    return BAD_USAGE
