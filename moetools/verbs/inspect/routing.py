"""How a model's routers spread the tokens of each task: measured in one pass, or read from saved statistics."""

from collections.abc import Sequence
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
from moetools.forward.saturation import check_comparable, common_choices
from moetools.forward.streaming import StreamedModel
from moetools.methods.placement import place_experts
from moetools.pipeline.plots import check_shown, write_shown
from moetools.pipeline.records import text_of_json
from moetools.pipeline.unchanged import Unchanged
from moetools.text.options import DataOptions, load_model_tokenizer, load_tokens
from moetools.verbs.inspect.options import RoutingOptions
from moetools.verbs.inspect.page import routing_page
from moetools.verbs.inspect.routing_report import RoutingReport, routing_report
from moetools.verbs.inspect.saturation import Saturation, saturation
from moetools.verbs.inspect.similarity import SIMILARITY_NEEDS
from moetools.verbs.inspect.weights_alike import weights_alike
from moetools.verbs.inspect.word_use import Decode
from moetools.verbs.place.plan import Placement, check_sequences, plan_placement

NEEDS = ("coactivation", "expert_choice", "load", "margin", "router", "sequence_load")
"""Statistics the report cannot do without."""
MORE = ("shared_output", "succession", "word_use")
"""Statistics that are measured as well; a saved file without them gives a report without what they say."""


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
        options: `stats` of an earlier run of any verb are used instead of a pass over the model; `compare` costs a
            pass over both models.
        text: to measure on; may be left out with `stats`, which must have been measured on exactly these tokens else.

    Raises:
        UserError: neither data nor stats, a `save_stats` that cannot be written, or a `compare` of another shape.
        StatisticsError: `stats` belongs to another model or other tokens, or lacks one of `NEEDS`.
        CheckpointError, UnsupportedModelError, DataError: the model or the text cannot be used.
    """
    if not text.data and options.stats is None:
        raise UserError(
            "routing is measured on text, and there is neither `data` nor `stats`",
            hint="`data`, or `stats` from an earlier run",
        )
    if options.compare is not None and not text.data:
        raise UserError("routers are compared on text, and there is no `data`", hint="give `data` beside `stats`")
    check_saving(options.stats, options.save_stats, has_data=bool(text.data))
    _check_placement(options)
    reads = {"model": Path(model), **dict(text.paths()), **dict(paths(options, "reads"))}
    check_apart(dict(paths(options, "writes")), reads)
    check_shown(options.html, options.plots, reads)
    checkpoint = open_model(model)
    arch = find_architecture(checkpoint.config)
    experts = arch.num_experts(checkpoint.config)
    assert experts is not None
    if options.devices is not None:
        place_experts([1.0] * experts, devices=options.devices, slots=experts + options.replicas, nodes=options.nodes)
    compared = _compared(options, checkpoint, text, forward, progress)
    if options.stats is not None:
        needs = (*NEEDS, *(SIMILARITY_NEEDS if options.similarity else ()))
        statistics = _saved(options.stats, needs, checkpoint, text, forward)
    else:
        statistics = _measured(options, checkpoint, text, forward, progress)
        if options.save_stats is not None:
            statistics.save(options.save_stats)
    report = routing_report(
        statistics,
        str(model),
        seed=text.seed,
        groups=arch.num_groups(checkpoint.config),
        decode=_decoder(text, checkpoint) if statistics.token_ids else None,
        weights=weights_alike(StreamedModel(checkpoint, forward, progress=progress)) if options.similarity else None,
    )
    report = replace(report, saturation=compared, placement=_placement(options, statistics, checkpoint))
    write_shown(options.html, options.plots, lambda: routing_page(report))
    return report


def _placement(options: RoutingOptions, statistics: ModelStatistics, checkpoint: Checkpoint) -> Placement | None:
    """The plan for `devices`, written to `expert_location` if that is asked for."""
    if options.devices is None:
        return None
    arch = find_architecture(checkpoint.config)
    plan = plan_placement(
        statistics,
        devices=options.devices,
        nodes=options.nodes,
        replicas=options.replicas,
        groups=arch.num_groups(checkpoint.config),
    )
    if options.expert_location is not None:
        num_layers = arch.num_layers(checkpoint.config) or max(statistics.layers) + 1
        location = plan.location(num_layers, statistics.shape.num_experts)
        write_durably(options.expert_location, text_of_json(location).encode())
    return plan


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
    options: RoutingOptions,
    checkpoint: Checkpoint,
    data: DataOptions,
    forward: ForwardOptions,
    progress: Progress | None,
) -> ModelStatistics:
    same_inputs = Unchanged([checkpoint])
    streamed = StreamedModel(checkpoint, forward, progress=progress)
    streamed.stock.check_names()
    tokens = load_tokens(data, checkpoint, streamed.vocab_size)
    if options.devices is not None:
        check_sequences(tokens.num_sequences)
    with same_inputs:
        more = SIMILARITY_NEEDS if options.similarity else ()
        return collect_statistics(streamed, tokens, (*NEEDS, *MORE, *more))


def _compared(
    options: RoutingOptions,
    checkpoint: Checkpoint,
    text: DataOptions,
    forward: ForwardOptions,
    progress: Progress | None,
) -> Saturation | None:
    """Agreement with the routers of `compare`, if it was given; it comes first, because it may have to be refused."""
    if options.compare is None:
        return None
    other = open_model(options.compare)
    ours, theirs = (StreamedModel(one, forward, progress=progress) for one in (checkpoint, other))
    tokens = load_tokens(text, checkpoint, ours.vocab_size)
    check_comparable(ours, theirs, tokens)
    for one in (ours, theirs):
        one.stock.check_names()
    shape = ours.layer_shape(len(tokens.tasks))
    with Unchanged([checkpoint, other]):
        found = common_choices(ours, theirs, tokens)
    chance = shape.top_k / shape.num_experts
    return saturation(found, str(options.compare), tokens.tasks, chance=chance, seed=text.seed)


def _decoder(text: DataOptions, checkpoint: Checkpoint) -> Decode | None:
    """What a token id stands for; None where there is no tokenizer that could say it (text may come as ids)."""
    vocab_size = find_architecture(checkpoint.config).text(checkpoint.config).get("vocab_size")
    try:
        tokenizer = load_model_tokenizer(text, checkpoint, vocab_size or 2**31)
    except MoetoolsError:
        return None
    return lambda token_id: str(tokenizer.decode([token_id]))


def _saved(
    stats: Path, needs: Sequence[str], checkpoint: Checkpoint, text: DataOptions, forward: ForwardOptions
) -> ModelStatistics:
    statistics = load_statistics(stats)
    tokens = None
    if text.data:
        tokens = load_tokens(text, checkpoint, StreamedModel(checkpoint, forward).vocab_size).fingerprint
    experts = find_architecture(checkpoint.config).num_experts(checkpoint.config)
    fingerprint = checkpoint.fingerprint()
    check_statistics(statistics, model=fingerprint, needs=needs, data=tokens, num_experts=experts)
    return statistics
