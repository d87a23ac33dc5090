"""A reduction that is healed: the reduced model is made first, then trained towards the original's predictions."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moetools.errors import UserError
from moetools.forward.options import ForwardOptions
from moetools.forward.progress import Progress
from moetools.pipeline.work import Outcome
from moetools.text.options import DataOptions
from moetools.training.options import PARTS, TrainOptions
from moetools.verbs.reduce.options import ReduceOptions
from moetools.verbs.reduce.reduced_model import ReducedModel
from moetools.verbs.reduce.report import ReduceReport
from moetools.verbs.train.healing import BATCH, HELD_OUT_MOST, heal_training
from moetools.verbs.train.trained_model import TrainedModel


class HealedModel(TrainedModel[ReduceReport]):
    """A reduced model, trained for some steps.

    Args:
        reduction: makes the model.
        steps, part: how long, and what is trained.
    """

    maker: ReducedModel

    def __init__(
        self,
        reduction: ReducedModel,
        text: DataOptions,
        forward: ForwardOptions,
        *,
        steps: int,
        part: str,
        seed: int,
        progress: Progress | None,
    ) -> None:
        self.steps, self.part, self.seed = steps, part, seed
        planned = TrainOptions(train=part, steps=steps, seed=seed)
        super().__init__(reduction.source.path, reduction, text, forward, planned, progress=progress)

    def fitting_training(self) -> TrainOptions:
        return heal_training(
            self.teacher, self.model, self.data, self.forward, steps=self.steps, part=self.part, seed=self.seed
        )

    def settings(self) -> Mapping[str, Any]:
        return {"healed": True, **super().settings()}

    def report(self, outcome: Outcome) -> ReduceReport:
        if self.made is None or self.trained is None:
            return self.maker.report(outcome)
        seconds = {**self.made.seconds, "heal": self.trained.seconds, "verify": outcome.seconds.get("verify", 0.0)}
        made = replace(
            self.made,
            out=outcome.out,
            checkpoint=outcome.checkpoint,
            seconds=seconds,
            peak_memory={**self.made.peak_memory, **outcome.peak_memory},
            verified=outcome.verified,
            notes=outcome.notes,
        )
        return replace(self.maker.report(made), healing=self.trained.facts())


def healing_text(options: ReduceOptions, text: DataOptions, seed: int) -> DataOptions:
    """The text to heal on: the one named for it, else all that the reduction's own has, in random order.

    No more sequences of a task are read than the steps take.

    Raises:
        UserError: no text, a negative number of steps, or an unknown part to train.
    """
    if options.heal_train not in PARTS:
        raise UserError(f"`heal_train={options.heal_train}` is unknown; legal: {', '.join(PARTS)}")
    if options.heal < 1:
        raise UserError(f"`heal={options.heal}` is below 1")
    named = options.heal_data or text.data
    if not named:
        raise UserError("`heal` trains on text", hint="`heal_data`, or `data`")
    samples = options.heal * BATCH + HELD_OUT_MOST
    return replace(text, data=named, samples=samples, shuffle=True, seed=seed)
