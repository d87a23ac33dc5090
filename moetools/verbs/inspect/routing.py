"""How a model's routers spread the tokens of each task: measured in one pass, or read from saved statistics."""

import os
from pathlib import Path

from moetools.architectures.base import find_architecture
from moetools.checkpoint.reader import Checkpoint
from moetools.errors import UserError
from moetools.formats.reader import open_model
from moetools.forward.calibrate import (
    ModelStatistics,
    check_statistics,
    collect_statistics,
    load_statistics,
)
from moetools.forward.progress import Progress
from moetools.forward.streaming import ForwardOptions, StreamedModel
from moetools.text.options import DataOptions, load_tokens
from moetools.verbs.inspect.routing_report import RoutingReport, routing_report

NEEDS = ("coactivation", "load", "router")
"""Statistics the report is made of."""


def inspect_routing(
    model: Path,
    data: DataOptions | None,
    forward: ForwardOptions,
    *,
    stats: Path | None = None,
    save_stats: Path | None = None,
    progress: Progress | None = None,
) -> RoutingReport:
    """Load, specialization and co-activation of every MoE layer, per task and over all tasks.

    Args:
        data: text to measure on; may be left out where `stats` is given. With both, the saved statistics must have been
            measured on exactly these tokens.
        stats: statistics saved by an earlier run of any verb, used instead of a pass over the model.
        save_stats: file to save the measured statistics to, for `--stats` of any verb.

    Raises:
        UserError: neither data nor stats, or a `save_stats` that cannot be written.
        StatisticsError: `stats` belongs to another model or other tokens, or lacks one of `NEEDS`.
        CheckpointError, UnsupportedModelError, DataError: the model or the text cannot be used.
    """
    options = data if data is not None and data.data else None
    _check_options(options, stats, save_stats)
    checkpoint = open_model(model)
    find_architecture(checkpoint.config)
    if stats is not None:
        statistics = _saved(stats, checkpoint, options, forward)
    else:
        assert options is not None
        statistics = _measured(checkpoint, options, forward, progress)
        if save_stats is not None:
            statistics.save(save_stats)
    return routing_report(statistics, str(model), seed=options.seed if options else 0)


def _check_options(data: DataOptions | None, stats: Path | None, save_stats: Path | None) -> None:
    if data is None and stats is None:
        raise UserError(
            "routing is measured on text, and there is neither --data nor --stats",
            hint="--data FILE (or NAME=FILE, repeated), or --stats FILE from an earlier run",
        )
    if save_stats is None:
        return
    if stats is not None:
        raise UserError("--stats and --save-stats together: the statistics are saved already")
    folder = save_stats.absolute().parent
    if save_stats.is_dir():
        raise UserError(f"--save-stats: '{save_stats}' is a directory", hint="name a file")
    if not folder.is_dir():
        raise UserError(f"--save-stats: the folder '{folder}' does not exist", hint="make it first")
    if not os.access(folder, os.W_OK):
        raise UserError(f"--save-stats: the folder '{folder}' cannot be written to")


def _measured(
    checkpoint: Checkpoint, data: DataOptions, forward: ForwardOptions, progress: Progress | None
) -> ModelStatistics:
    streamed = StreamedModel(checkpoint, forward, progress=progress)
    streamed.stock.check_names()
    return collect_statistics(streamed, load_tokens(data, checkpoint, streamed.vocab_size), NEEDS)


def _saved(stats: Path, checkpoint: Checkpoint, data: DataOptions | None, forward: ForwardOptions) -> ModelStatistics:
    statistics = load_statistics(stats)
    tokens = None
    if data is not None:
        tokens = load_tokens(data, checkpoint, StreamedModel(checkpoint, forward).vocab_size).fingerprint
    config = checkpoint.config
    check_statistics(
        statistics,
        model=checkpoint.fingerprint(),
        needs=NEEDS,
        data=tokens,
        num_experts=find_architecture(config).num_experts(config),
    )
    return statistics
