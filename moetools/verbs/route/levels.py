"""Routing by sentence and by sequence, measured against routing by token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moetools.checkpoint.reader import Checkpoint
from moetools.errors import CheckpointError, UnsupportedModelError, UserError
from moetools.forward.evaluate import Evaluator
from moetools.forward.metrics import ModelMetrics
from moetools.forward.options import ForwardOptions
from moetools.forward.progress import Progress
from moetools.routing.router_control import RouterControl, SteeredModel
from moetools.routing.routing_level import RoutingLevel, sentence_ends
from moetools.text.options import DataOptions, load_model_tokenizer


@dataclass(frozen=True, kw_only=True)
class MeasuredLevel:
    """One way of routing.

    Attributes:
        level: what it is.
        causal: whether it can generate.
        metrics: on the held-out text; None where the family's router cannot be steered so.
        refused: why not.
    """

    level: RoutingLevel
    causal: bool
    metrics: ModelMetrics | None
    refused: str = ""


def measure_levels(
    source: Checkpoint,
    levels: Sequence[RoutingLevel],
    evaluator: Evaluator,
    forward: ForwardOptions,
    ends_V: Tensor | None,
    progress: Progress | None,
) -> list[MeasuredLevel]:
    """Perplexity and KL of the full model, routed in each of these ways."""
    found = []
    for level in levels:
        model = SteeredModel(source, forward, progress=progress)
        control = RouterControl(model.stock.model, model.arch, ends_V=ends_V)
        control.level, model.control = level, control
        try:
            with control.installed():
                metrics = evaluator.measure(model)
        except (UserError, UnsupportedModelError) as error:
            found.append(MeasuredLevel(level=level, causal=level.causal, metrics=None, refused=error.message))
            continue
        found.append(MeasuredLevel(level=level, causal=level.causal, metrics=metrics))
    return found


def find_sentence_ends(data: DataOptions, source: Checkpoint, vocab_size: int) -> Tensor | None:
    """Sentence ends of the tokenizer named, else the model's own; None for a model without one."""
    try:
        return sentence_ends(load_model_tokenizer(data, source, vocab_size), vocab_size)
    except CheckpointError:
        return None


def ids_of(ends_V: Tensor | None) -> list[int]:
    """The token ids that end a sentence."""
    return [] if ends_V is None else torch.nonzero(ends_V)[:, 0].tolist()
