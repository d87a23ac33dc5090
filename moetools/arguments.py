"""Options of verbs, written once.

A field of an option class made by `option` is a keyword argument of the Python API and an option of the command line;
its help text is the documentation of both. Modules with option classes import no torch, so that `--help` is fast.

Messages of errors name arguments in backticks, `name` or `name=value`; the command line shows them as options.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Any, Literal

DATA, RUNNING, RECIPE, STATISTICS = "Data", "Running", "Recipe", "Statistics"
TRAINING, OUTPUT, DISPLAY = "Training", "Output", "Display"

_KEY = "moetools"


def option(
    default: Any,
    help: str,  # noqa: A002 - what everybody calls it
    *,
    metavar: str | None = None,
    flags: str | None = None,
    panel: str | None = None,
    choices: Callable[[], Sequence[str]] | None = None,
    path: Literal["reads", "writes"] | None = None,
) -> Any:
    """A field of an option class.

    Args:
        default: also the type's: a list or dict is made anew for every instance.
        help: one or two sentences.
        metavar: what stands for the value in `--help`.
        flags: other names on the command line than `--field-name`, as Typer takes them.
        panel: heading it stands under in `--help`.
        choices: legal names, also for shell completion.
        path: whether the value is a path that the run reads, or writes.
    """
    about = {"help": help, "metavar": metavar, "flags": flags, "panel": panel, "choices": choices, "path": path}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={_KEY: about})
    return field(default=default, metadata={_KEY: about})


def about(option_field: Any) -> dict[str, Any] | None:
    """What `option` was told of a field; None for a plain one."""
    return option_field.metadata.get(_KEY)


def paths(options: Any, use: Literal["reads", "writes"]) -> Iterator[tuple[str, Path]]:
    """(argument in backticks, path) of the paths that an instance of an option class names."""
    for one in fields(options):
        known, value = about(one), getattr(options, one.name)
        if known is not None and known["path"] == use and value is not None:
            yield f"`{one.name}`", Path(value)
