"""Reduce the number of experts: statistics -> decision per layer -> new layer weights -> a verified checkpoint."""

from dataclasses import replace
from pathlib import Path

from moetools.errors import UserError
from moetools.forward.options import ForwardOptions
from moetools.forward.progress import Progress
from moetools.text.options import DataOptions
from moetools.verbs.reduce.reduction import CompressOptions, Reduction, Verb, resolve_target
from moetools.verbs.reduce.report import CompressReport
from moetools.verbs.train.healing import check_heal, heal_checkpoint, plan_healing

__all__ = ["CompressOptions", "CompressReport", "merge_experts", "prune_experts", "resolve_target"]


def prune_experts(
    model: Path,
    out: Path,
    data: DataOptions | None,
    forward: ForwardOptions,
    options: CompressOptions,
    *,
    command: str,
    progress: Progress | None = None,
) -> CompressReport:
    """Drop experts of every MoE layer and write the smaller checkpoint.

    Args:
        command: the command line, for the report.

    Raises:
        MoetoolsError: see `moetools.verbs.reduce.reduction.Reduction`; nothing is left in place of `out`.
    """
    return _reduce("prune", model, out, data, forward, options, command, progress)


def merge_experts(
    model: Path,
    out: Path,
    data: DataOptions | None,
    forward: ForwardOptions,
    options: CompressOptions,
    *,
    command: str,
    progress: Progress | None = None,
) -> CompressReport:
    """Merge the experts of every MoE layer into fewer, down to one, and write the smaller checkpoint.

    Raises:
        MoetoolsError: see `moetools.verbs.reduce.reduction.Reduction`; nothing is left in place of `out`.
    """
    return _reduce("merge", model, out, data, forward, options, command, progress)


def _reduce(
    verb: Verb,
    model: Path,
    out: Path,
    data: DataOptions | None,
    forward: ForwardOptions,
    options: CompressOptions,
    command: str,
    progress: Progress | None,
) -> CompressReport:
    if options.heal_data is not None and not options.heal:
        raise UserError("--heal-data without --heal", hint="--heal STEPS says for how long")
    if not options.heal:
        return Reduction(verb, model, out, data, forward, options, command, progress).run()
    text = check_heal(options, data)
    # The reduced model is written whole and verified under another name; healing then reads it like any other.
    reduced = Path(out).with_name(f".{Path(out).name}.unhealed")
    planned = Reduction(verb, model, out, data, forward, replace(options, dry_run=True), command, progress)
    checked = planned.run()
    healing = plan_healing(planned, text, options)
    if options.dry_run:
        return checked
    aside = replace(options, overwrite=True)
    report = Reduction(verb, model, reduced, data, forward, aside, command, progress).run()
    return heal_checkpoint(
        report,
        reduced,
        Path(out),
        forward,
        healing,
        overwrite=options.overwrite,
        verify=options.verify,
        progress=progress,
    )
