"""How a model's routers spread the tokens of each task: measured in one pass, or read from saved statistics."""

from pathlib import Path

from moetools.architectures.base import find_architecture
from moetools.arguments import paths
from moetools.checkpoint.output import check_apart
from moetools.checkpoint.reader import Checkpoint
from moetools.errors import UserError
from moetools.formats.reader import open_model
from moetools.forward.calibrate import (
    ModelStatistics,
    check_saving,
    check_statistics,
    collect_statistics,
    load_statistics,
)
from moetools.forward.options import ForwardOptions
from moetools.forward.progress import Progress
from moetools.forward.streaming import StreamedModel
from moetools.text.options import DataOptions, load_tokens
from moetools.verbs.inspect.options import RoutingOptions
from moetools.verbs.inspect.routing_report import RoutingReport, routing_report

NEEDS = ("coactivation", "load", "router", "sequence_load")
"""Statistics the report is made of."""


def inspect_routing(
    model: Path,
    options: RoutingOptions,
    text: DataOptions,
    forward: ForwardOptions,
    *,
    progress: Progress | None = None,
) -> RoutingReport:
    """Load, specialization and co-activation of every MoE layer, per task and over all tasks.

    Args:
        options: `stats` of an earlier run of any verb are used instead of a pass over the model.
        text: to measure on; may be left out with `stats`, which must have been measured on exactly these tokens else.

    Raises:
        UserError: neither data nor stats, or a `save_stats` that cannot be written.
        StatisticsError: `stats` belongs to another model or other tokens, or lacks one of `NEEDS`.
        CheckpointError, UnsupportedModelError, DataError: the model or the text cannot be used.
    """
    if not text.data and options.stats is None:
        raise UserError(
            "routing is measured on text, and there is neither `data` nor `stats`",
            hint="`data`, or `stats` from an earlier run",
        )
    check_saving(options.stats, options.save_stats, has_data=bool(text.data))
    reads = {"model": Path(model), **dict(text.paths()), **dict(paths(options, "reads"))}
    check_apart(dict(paths(options, "writes")), reads)
    checkpoint = open_model(model)
    find_architecture(checkpoint.config)
    if options.stats is not None:
        statistics = _saved(options.stats, checkpoint, text, forward)
    else:
        statistics = _measured(checkpoint, text, forward, progress)
        if options.save_stats is not None:
            statistics.save(options.save_stats)
    return routing_report(statistics, str(model), seed=text.seed)


def _measured(
    checkpoint: Checkpoint, data: DataOptions, forward: ForwardOptions, progress: Progress | None
) -> ModelStatistics:
    streamed = StreamedModel(checkpoint, forward, progress=progress)
    streamed.stock.check_names()
    return collect_statistics(streamed, load_tokens(data, checkpoint, streamed.vocab_size), NEEDS)


def _saved(stats: Path, checkpoint: Checkpoint, text: DataOptions, forward: ForwardOptions) -> ModelStatistics:
    statistics = load_statistics(stats)
    tokens = None
    if text.data:
        tokens = load_tokens(text, checkpoint, StreamedModel(checkpoint, forward).vocab_size).fingerprint
    experts = find_architecture(checkpoint.config).num_experts(checkpoint.config)
    fingerprint = checkpoint.fingerprint()
    check_statistics(statistics, model=fingerprint, needs=NEEDS, data=tokens, num_experts=experts)
    return statistics
