"""How a model's routers spread the tokens of each task: measured in one pass, or read from saved statistics."""

from dataclasses import replace
from pathlib import Path

from moetools.architectures.base import find_architecture
from moetools.arguments import paths
from moetools.checkpoint.durable import write_durably
from moetools.checkpoint.folder import read_json_object
from moetools.checkpoint.output import check_apart, check_file
from moetools.checkpoint.reader import Checkpoint
from moetools.errors import MoetoolsError, UserError
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
from moetools.methods.placement import place_experts
from moetools.pipeline.records import text_of_json
from moetools.pipeline.unchanged import Unchanged
from moetools.text.options import DataOptions, load_tokens
from moetools.verbs.inspect.options import RoutingOptions
from moetools.verbs.inspect.routing_report import RoutingReport, routing_report
from moetools.verbs.place.plan import check_sequences, plan_placement

NEEDS = ("coactivation", "expert_choice", "load", "margin", "router", "sequence_load")
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
    _check_placement(options)
    reads = {"model": Path(model), **dict(text.paths()), **dict(paths(options, "reads"))}
    check_apart(dict(paths(options, "writes")), reads)
    checkpoint = open_model(model)
    arch = find_architecture(checkpoint.config)
    experts = arch.num_experts(checkpoint.config)
    assert experts is not None
    if options.devices is not None:
        place_experts([1.0] * experts, devices=options.devices, slots=experts + options.replicas, nodes=options.nodes)
    if options.stats is not None:
        statistics = _saved(options.stats, checkpoint, text, forward)
    else:
        statistics = _measured(checkpoint, text, forward, progress, placed=options.devices is not None)
        if options.save_stats is not None:
            statistics.save(options.save_stats)
    report = routing_report(statistics, str(model), seed=text.seed)
    if options.devices is None:
        return report
    plan = plan_placement(
        statistics,
        devices=options.devices,
        nodes=options.nodes,
        replicas=options.replicas,
        groups=arch.num_groups(checkpoint.config),
    )
    if options.expert_location is not None:
        num_layers = arch.num_layers(checkpoint.config) or max(statistics.layers) + 1
        location = plan.location(num_layers, experts)
        write_durably(options.expert_location, text_of_json(location).encode())
    return replace(report, placement=plan)


def _check_placement(options: RoutingOptions) -> None:
    """Raises UserError where a placement cannot be made or written."""
    file = options.expert_location
    if options.devices is None and (file is not None or options.replicas or options.nodes != 1):
        raise UserError("a placement needs to know how many devices there are", hint="`devices=8`")
    if options.replicas < 0:
        raise UserError(f"`replicas={options.replicas}` is negative")
    if file is None:
        return
    check_file("expert_location", file)
    if file.exists() and not _is_location(file):
        raise UserError(f"`expert_location`: '{file}' exists and is something else", hint="choose another name")


def _is_location(file: Path) -> bool:
    try:
        return "physical_to_logical_map" in read_json_object(file)
    except MoetoolsError:
        return False


def _measured(
    checkpoint: Checkpoint, data: DataOptions, forward: ForwardOptions, progress: Progress | None, *, placed: bool
) -> ModelStatistics:
    same_inputs = Unchanged([checkpoint])
    streamed = StreamedModel(checkpoint, forward, progress=progress)
    streamed.stock.check_names()
    tokens = load_tokens(data, checkpoint, streamed.vocab_size)
    if placed:
        check_sequences(tokens.num_sequences)
    with same_inputs:
        return collect_statistics(streamed, tokens, NEEDS)


def _saved(stats: Path, checkpoint: Checkpoint, text: DataOptions, forward: ForwardOptions) -> ModelStatistics:
    statistics = load_statistics(stats)
    tokens = None
    if text.data:
        tokens = load_tokens(text, checkpoint, StreamedModel(checkpoint, forward).vocab_size).fingerprint
    experts = find_architecture(checkpoint.config).num_experts(checkpoint.config)
    fingerprint = checkpoint.fingerprint()
    check_statistics(statistics, model=fingerprint, needs=NEEDS, data=tokens, num_experts=experts)
    return statistics
