"""Router saturation: how far two checkpoints of one model choose the same experts."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moetools.forward.saturation import CommonChoices
from moetools.pipeline.table import Table

DRAWS = 200


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Share of top-k choices that agree, mean over tokens of |chosen by one & chosen by the other| / K.

    Attributes:
        share: over all tokens.
        low, high: its 95 % interval over bootstrap samples of whole sequences.
        tasks: the share of each task's tokens.
    """

    share: float
    low: float
    high: float
    tasks: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Saturation:
    """Of two checkpoints of one model over the same text.

    Attributes:
        other: folder of the other checkpoint.
        chance: K / E, the share of two routers that choose evenly and know nothing of each other.
        layers: decoder layer -> agreement.

    Source: router saturation, OLMoE (Muennighoff et al. 2024, arXiv 2409.02060, section 5.1).
    """

    other: str
    chance: float
    layers: Mapping[int, Agreement]

    def table(self) -> Table:
        """One row per layer."""
        tasks = list(next(iter(self.layers.values())).tasks)
        shown = tasks if len(tasks) > 1 else []
        rows = [
            [str(index), f"{100 * one.share:.1f}", f"{100 * one.low:.1f} to {100 * one.high:.1f}"]
            + [f"{100 * one.tasks[task]:.1f}" for task in shown]
            for index, one in self.layers.items()
        ]
        note = f"% of each token's experts that both checkpoints choose; chance: {self.chance:.1%}"
        return Table(
            title=f"router saturation against {self.other}",
            columns=["layer", "agree %", "95 %", *shown],
            rows=rows,
            note=note,
        )


def saturation(found: CommonChoices, other: str, tasks: tuple[str, ...], *, chance: float, seed: int) -> Saturation:
    """Shares of what `common_choices` counted."""
    generator = torch.Generator().manual_seed(seed)
    drawn_RS = torch.randint(len(found.slots), (DRAWS, len(found.slots)), generator=generator)

    def agreement(common_S: Tensor) -> Agreement:
        samples_R = common_S[drawn_RS].sum(1) / found.slots[drawn_RS].sum(1)
        low, high = samples_R.double().quantile(torch.tensor([0.025, 0.975]).double()).tolist()
        masks = {task: found.task == number for number, task in enumerate(tasks)}
        return Agreement(
            share=int(common_S.sum()) / int(found.slots.sum()),
            low=low,
            high=high,
            tasks={task: int(common_S[mine].sum()) / int(found.slots[mine].sum()) for task, mine in masks.items()},
        )

    layers = {index: agreement(common_S) for index, common_S in found.layers.items()}
    return Saturation(other=other, chance=chance, layers=layers)
