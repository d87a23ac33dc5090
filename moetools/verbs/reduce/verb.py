"""Reduce the number of experts: statistics -> decision per layer -> new layer weights -> a verified checkpoint."""

from pathlib import Path

from moetools.errors import UserError
from moetools.forward.options import ForwardOptions
from moetools.forward.progress import Progress
from moetools.pipeline.carry_out import carry_out
from moetools.pipeline.options import Writing
from moetools.text.options import DataOptions
from moetools.verbs.reduce.healed import HealedModel, healing_text
from moetools.verbs.reduce.options import MergeOptions, PruneOptions, ReduceOptions
from moetools.verbs.reduce.report import ReduceReport
from moetools.verbs.reduce.work import ReduceWork, Verb


def prune_experts(
    model: Path,
    out: Path,
    options: PruneOptions,
    text: DataOptions,
    forward: ForwardOptions,
    writing: Writing,
    *,
    command: str = "",
    progress: Progress | None = None,
) -> ReduceReport:
    """Drop experts of every MoE layer and write the smaller checkpoint.

    Args:
        command: the command line, for the report.

    Raises:
        MoetoolsError: see `ReduceWork` and `carry_out`; nothing is left in place of `out`.
    """
    return _reduce("prune", model, out, options, text, forward, writing, command, progress)


def merge_experts(
    model: Path,
    out: Path,
    options: MergeOptions,
    text: DataOptions,
    forward: ForwardOptions,
    writing: Writing,
    *,
    command: str = "",
    progress: Progress | None = None,
) -> ReduceReport:
    """Merge the experts of every MoE layer into fewer, down to one, and write the smaller checkpoint.

    Raises:
        MoetoolsError: see `ReduceWork` and `carry_out`; nothing is left in place of `out`.
    """
    return _reduce("merge", model, out, options, text, forward, writing, command, progress)


def _reduce(
    verb: Verb,
    model: Path,
    out: Path,
    options: ReduceOptions,
    text: DataOptions,
    forward: ForwardOptions,
    writing: Writing,
    command: str,
    progress: Progress | None,
) -> ReduceReport:
    if options.heal_data and not options.heal:
        raise UserError("`heal_data` without `heal`", hint="`heal=STEPS` says for how long")
    seed = text.seed
    work = ReduceWork(verb, model, text, forward, options, command=command, seed=seed, progress=progress)
    if not options.heal:
        return carry_out(work, out, writing)
    healed = HealedModel(
        work,
        healing_text(options, text, seed),
        forward,
        steps=options.heal,
        part=options.heal_train,
        seed=seed,
        progress=progress,
    )
    return carry_out(healed, out, writing)
