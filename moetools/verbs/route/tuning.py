"""Tune the routers of an extracted checkpoint towards the full model on the task's own text."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from moetools.architectures.weights import LayerWeights
from moetools.checkpoint.reader import Checkpoint, open_checkpoint
from moetools.forward.options import ForwardOptions
from moetools.forward.progress import Progress
from moetools.forward.streaming import StreamedModel
from moetools.routing.task_routing import TaskRouting
from moetools.text.tokens import TokenData
from moetools.verbs.reduce.report import CompressReport
from moetools.verbs.train.healing import heal_training, healing_facts
from moetools.verbs.train.training import TrainingReport, TrainingRun


@dataclass(frozen=True, kw_only=True)
class TunedRouters:
    """What tuning brought.

    Attributes:
        routers: per MoE layer the router's fields of `LayerWeights`, as they are on disk.
        curve: (step, held-out KL in nats per token).
    """

    routers: Mapping[int, Mapping[str, Tensor]]
    curve: list[tuple[int, float]]


def tune_routers(
    teacher: Checkpoint,
    report: CompressReport,
    extracted: Path,
    out: Path,
    tokens: TokenData,
    forward: ForwardOptions,
    *,
    steps: int,
    seed: int,
    verify: bool,
    progress: Progress | None,
) -> TunedRouters:
    """Train the routers of `extracted` for the predictions of `teacher`, and write the result to `out`.

    An extracted checkpoint's router is the full one under the task's mask, so this is training under the mask.

    Args:
        report: of the run that wrote `extracted`; goes on with what was tuned.
    """
    models = StreamedModel(teacher, forward), StreamedModel(open_checkpoint(extracted), forward)
    training = heal_training(*models, tokens, forward, steps=steps, part="router", seed=seed)
    run = TrainingRun(teacher.path, extracted, out, tokens, forward, training, verify=verify, progress=progress)

    def describe(training: TrainingReport, _folder: Path) -> tuple[Mapping[str, Any], None]:
        return replace(report, healing=healing_facts(training), verified=verify).to_json(), None

    facts = healing_facts(run.run(describe))
    return TunedRouters(routers=_routers(StreamedModel(open_checkpoint(out), forward)), curve=facts["curve"])


def _routers(model: StreamedModel) -> dict[int, dict[str, Tensor]]:
    found = {}
    for index in model.stock.moe_layers:
        fields = model.stock.weights(index, model.stock.read_layer(index)).tensors()
        found[index] = {name: fields[name].cpu().clone() for name in LayerWeights.ROUTER_FIELDS if name in fields}
    return found


def with_routers(routing: TaskRouting, task: str, result: TunedRouters) -> TaskRouting:
    """The routing with a task's tuned routers."""
    fields: dict[str, Any] = {**routing.routers, task: result.routers}
    return replace(routing, routers=fields)
