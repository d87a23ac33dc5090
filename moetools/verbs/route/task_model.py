"""A checkpoint with one task's (or a union's) experts, and the same with tuned routers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetools.architectures.weights import LayerWeights
from moetools.checkpoint.durable import write_durably
from moetools.checkpoint.reader import Checkpoint
from moetools.formats.reader import open_model
from moetools.forward.options import ForwardOptions
from moetools.forward.progress import Progress
from moetools.forward.streaming import StreamedModel
from moetools.methods.prune.base import KeepListed
from moetools.passes.recipes import Candidate, candidate_of, candidates_for
from moetools.pipeline.records import describe_output, text_of_json, versions
from moetools.pipeline.work import Outcome
from moetools.routing.task_routing import FILE_NAME, TaskRouting
from moetools.text.options import DataOptions
from moetools.text.tokens import TokenData
from moetools.verbs.reduce.healed import HealedModel
from moetools.verbs.reduce.reduced_model import ReducedModel, decision_of
from moetools.verbs.reduce.report import ReduceReport
from moetools.verbs.route.selection import TaskSets


class TaskModel(ReducedModel):
    """Some of a checkpoint's experts.

    Args:
        sets: its experts.
        tokens: the task's text, for the refit and the probe of the verification.
        refit: "joint" to solve the down projections anew on the task's own text, or "none".
        place: where the checkpoint will be in the end, for the report.
        routing: put beside a union's weights: its tasks' experts in the union's numbering.
        method, command: for the report.
        mtp, output_format: see `ReducedModel`.
    """

    def __init__(
        self,
        source: Checkpoint,
        sets: TaskSets,
        tokens: TokenData,
        forward: ForwardOptions,
        *,
        refit: str,
        place: Path,
        routing: TaskRouting | None,
        method: str,
        command: str,
        seed: int,
        progress: Progress | None,
        mtp: str | None,
        output_format: str | None,
    ) -> None:
        self._recipe = {} if refit == "none" else {"refit": refit, "sequential": True}
        candidate = candidate_of(KeepListed(every=None, layers=sets.experts), self._recipe)
        super().__init__(
            source,
            forward,
            progress,
            verb="route-tasks",
            candidates=[candidate],
            target=sets.keep,
            seed=seed,
            mtp=mtp,
            output_format=output_format,
        )
        self.stock = not self.stock_problem
        self.sets, self.data, self.place, self.routing = sets, tokens, place, routing
        self.method, self.command = method, command

    def mtp_candidates(self, layer: int) -> tuple[Candidate, ...]:  # noqa: ARG002 - one for all
        """The task's scores are of the trunk's layers; an MTP layer keeps what REAP keeps on the task's text."""
        return candidates_for("prune", "reap", self._recipe)

    def settings(self) -> Mapping[str, Any]:
        experts = {str(layer): list(found) for layer, found in self.sets.experts.items()}
        return {**super().settings(), "listed": experts}

    def complete(self, contents: Path) -> None:
        super().complete(contents)
        if self.routing is not None:
            write_durably(contents / FILE_NAME, text_of_json(self.routing.to_json()).encode())

    def report(self, outcome: Outcome) -> ReduceReport:
        assert self.data is not None
        before, written = describe_output(self.source), outcome.checkpoint
        tasks = {"tasks": list(self.sets.tasks), "tokens": self.data.num_tokens, "data": self.data.fingerprint}
        return ReduceReport(
            verb="route-tasks",
            method=self.method,
            command=self.command,
            out=str(self.place),
            versions=versions(),
            seed=self.seed,
            input_path=str(self.source.path),
            input_fingerprint=self.source.fingerprint(),
            model_type=self.arch.model_type,
            provenance=tasks,
            before=before,
            after=before if written is None else describe_output(written),
            layers={index: decision_of(facts) for index, facts in outcome.layers.items()},
            load=None,
            verified=outcome.verified,
            seconds=outcome.seconds,
            peak_memory=outcome.peak_memory,
            memory=outcome.memory,
            **self.precision(outcome),
            mtp=self.mtp_facts(outcome),
            warnings=tuple(filter(None, [self.mtp.warning])),
        )


class TunedTaskModel(HealedModel):
    """A task's checkpoint with its routers trained towards the full model on the task's own text.

    An extracted checkpoint's router is the full one under the task's mask, so this is training under the mask.
    """

    def __init__(
        self, task: TaskModel, forward: ForwardOptions, *, steps: int, seed: int, progress: Progress | None
    ) -> None:
        super().__init__(task, DataOptions(), forward, steps=steps, part="router", seed=seed, progress=progress)
        assert task.data is not None
        self._tokens = task.data

    def read_text(self) -> TokenData:
        return self._tokens


@dataclass(frozen=True, kw_only=True)
class TunedRouters:
    """What tuning brought.

    Attributes:
        routers: per MoE layer the router's fields of `LayerWeights`, as they are on disk.
        curve: (step, held-out KL in nats per token).
    """

    routers: Mapping[int, Mapping[str, Tensor]]
    curve: list[tuple[int, float]]


def routers_of(folder: Path, forward: ForwardOptions) -> dict[int, dict[str, Tensor]]:
    """The routers of every MoE layer of a checkpoint."""
    model = StreamedModel(open_model(folder), forward)
    found = {}
    with torch.no_grad():
        for index in model.stock.moe_layers:
            fields = model.stock.weights(index, model.stock.read_layer(index)).tensors()
            found[index] = {name: fields[name].cpu().clone() for name in LayerWeights.ROUTER_FIELDS if name in fields}
    return found


def with_routers(routing: TaskRouting, task: str, routers: Mapping[int, Mapping[str, Tensor]]) -> TaskRouting:
    """The routing with a task's tuned routers."""
    fields: dict[str, Any] = {**routing.routers, task: routers}
    return replace(routing, routers=fields)
