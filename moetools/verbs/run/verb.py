"""Carry out a recipe: a chain of verbs."""

from pathlib import Path

from moetools.forward.progress import Progress
from moetools.verbs.run.chain import Chain
from moetools.verbs.run.folder import check_folder, own_folder
from moetools.verbs.run.options import RunOptions
from moetools.verbs.run.recipe import load_recipe
from moetools.verbs.run.report import RunReport


def run(recipe: Path, options: RunOptions, *, progress: Progress | None = None) -> RunReport:
    """Carry out the steps of a recipe that are not done yet.

    The whole chain is checked before the first step begins.

    Raises:
        UserError: what is wrong with the recipe, naming the step.
        MoetoolsError: what a step refuses; finished steps stay finished.
    """
    found = load_recipe(recipe, options.set)
    if options.dry_run:
        check_folder(found.out)
        return Chain(found, progress).check()
    with own_folder(found.out):
        chain = Chain(found, progress)
        chain.check()
        return chain.run()
