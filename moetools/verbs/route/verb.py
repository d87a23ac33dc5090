"""Choose each task's experts, write a small checkpoint per task, and measure what that is worth."""

from dataclasses import replace
from pathlib import Path

from moetools.forward.options import ForwardOptions
from moetools.forward.progress import Progress
from moetools.pipeline.carry_out import carry_out
from moetools.pipeline.options import Writing
from moetools.pipeline.plots import check_shown, write_shown
from moetools.text.options import DataOptions
from moetools.verbs.route.html import route_page
from moetools.verbs.route.options import RouteOptions
from moetools.verbs.route.report import RouteReport
from moetools.verbs.route.work import TaskFolder


def route_tasks(
    model: Path,
    out: Path,
    options: RouteOptions,
    text: DataOptions,
    forward: ForwardOptions,
    writing: Writing,
    *,
    command: str = "",
    progress: Progress | None = None,
) -> RouteReport:
    """Write a checkpoint per task (`out/TASK`), the routing for use at run time, and a report.

    One pass over the text of all tasks measures every expert's worth to every task; held-out text judges the result.

    Args:
        command: the command line, for the report.

    Raises:
        MoetoolsError: see `TaskFolder` and `carry_out`; nothing is left in place of `out`.
    """
    if options.plots is not None:
        held_out = {f"held-out {what}": path for what, path in replace(text, data=options.test).paths()}
        check_shown(None, options.plots, {"model": Path(model), "output": Path(out), **dict(text.paths()), **held_out})
    # Pictures come behind the checkpoints, whose bytes do not depend on them.
    rest = replace(options, plots=None)
    work = TaskFolder(model, Path(out), text, forward, rest, command=command, progress=progress)
    report = carry_out(work, out, writing)
    if not report.dry_run:
        write_shown(None, options.plots, lambda: route_page(report))
    return report
