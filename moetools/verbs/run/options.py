"""What is asked of `run`."""

from dataclasses import dataclass

from moetools.arguments import OUTPUT, option


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What is asked of `run`."""

    set: list[str] = option(
        [],
        "Give a variable of the recipe its value. Repeat it for several variables; a variable that is given several "
        "times is a list.",
        metavar="NAME=VALUE",
    )
    dry_run: bool = option(
        False,
        "Check the whole chain and show what every step would do, with sizes, memory and time; write nothing.",
        panel=OUTPUT,
    )
