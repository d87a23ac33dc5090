"""`moetools demo`."""

from pathlib import Path
from typing import Annotated

import typer

from moetools.cli import options as opt
from moetools.cli.console import Session

Directory = Annotated[
    Path, typer.Argument(metavar="DIR", help="Folder for the model, its data and the results.", show_default=False)
]
Quick = Annotated[bool, typer.Option("--quick", help="Use less text; the numbers are rougher.")]


def command(
    directory: Directory,
    quick: Quick = False,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    memory_budget: opt.MemoryBudget = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Try everything on the small MoE model that comes with the package, offline.

    Puts the model and its data into DIR, prunes and merges it to half of its experts, and compares all three.
    """
    with Session(as_json=as_json, quiet=quiet, debug=debug) as session:
        from moetools.verbs.demo import demo

        forward = opt.forward_options(device=device, dtype=dtype, memory_budget=memory_budget)
        session.result(demo(directory, forward, progress=session.progress, quick=quick))
