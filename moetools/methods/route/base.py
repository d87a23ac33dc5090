"""The contract of a task score, and which experts a task gets for its scores.

Letters: S sequences, G tasks, E experts. Statistics are measured per sequence (every sequence counts as a task of its
own), so that the tasks can be put together, and shuffled for a null, without another pass.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moetools.methods.base import ExpertTarget, LayerStatistics


@dataclass(frozen=True, kw_only=True)
class TaskLabels:
    """Which task every measured sequence belongs to.

    Attributes:
        task_S: index of the task, 0 <= task < num_tasks.
        num_tasks: G.
    """

    task_S: Int[Tensor, "S"]
    num_tasks: int

    def sum(self, value_SE: Float[Tensor, "S E"]) -> Float[Tensor, "G E"]:
        """Sum over the sequences of every task, fp64."""
        total_GE = torch.zeros(self.num_tasks, value_SE.shape[1], dtype=torch.float64)
        return total_GE.index_add_(0, self.task_S, value_SE.double())

    def mean(self, value_SE: Float[Tensor, "S E"]) -> Float[Tensor, "G E"]:
        """Mean over the sequences of every task, each counting the same; 0 for a task without any."""
        return self.sum(value_SE) / self.sequences_G.clamp(min=1)[:, None]

    @property
    def sequences_G(self) -> Int[Tensor, "G"]:
        return torch.bincount(self.task_S, minlength=self.num_tasks)

    def shuffled(self, generator: torch.Generator) -> "TaskLabels":
        """The same numbers of sequences per task, dealt out at random."""
        return replace(self, task_S=self.task_S[torch.randperm(len(self.task_S), generator=generator)])


class RouteScore(ABC):
    """What every expert of a layer is worth to every task.

    Attributes:
        name: the plug-in's file name, with `-` for `_`.
        needs: statistics `scores` reads, measured per sequence.
        guarded: super experts (`moetools.methods.prune.base.super_experts`) are kept before all others.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    guarded: ClassVar[bool] = False

    @abstractmethod
    def scores(self, statistics: LayerStatistics, target: ExpertTarget, labels: TaskLabels) -> Float[Tensor, "G E"]:
        """Scores, fp64, higher is worth more; none is negative. All zero for a task without tokens.

        Raises:
            StatisticsError: a statistic is missing, belongs to another layer size, or is not finite.
        """


def keep_best(score_E: Float[Tensor, "E"], target: ExpertTarget) -> tuple[int, ...]:
    """The `keep / num_groups` best experts of every router group, ascending; ties go to the lower index.

    Experts in `target.protected` come before all others.
    """
    score = score_E.tolist()
    kept: list[int] = []
    for members in target.group_members():
        ranked = sorted(members, key=lambda expert: (expert not in target.protected, -score[expert], expert))
        kept += ranked[: target.keep_per_group]
    return tuple(sorted(kept))


def count_for_share(score_E: Float[Tensor, "E"], share: float, num_groups: int = 1) -> int:
    """The least number of experts whose scores make up `share` of the layer's total: the top-p rule.

    Every router group keeps equally many, its best. A layer without any score needs all its experts.

    Source: ESFT (arXiv 2407.01906, section 3.2), there with a number of its own for every layer.
    """
    grouped = score_E.view(num_groups, -1).sort(dim=1, descending=True).values
    total = grouped.sum()
    if total <= 0:
        return score_E.numel()
    reached = grouped.sum(0).cumsum(0) / total
    # Rounding must not ask for one expert more than a share of 1 needs.
    enough = (reached >= share - 1e-12).nonzero()
    return num_groups * (int(enough[0, 0]) + 1 if len(enough) else grouped.shape[1])


def score_share(score_E: Float[Tensor, "E"], kept: Sequence[int]) -> float:
    """Part of the layer's total score that the kept experts have; 0 for a layer without any."""
    total = score_E.sum().item()
    return score_E[list(kept)].sum().item() / total if total > 0 else 0.0


def union_of(sets: Sequence[Sequence[int]], score_GE: Float[Tensor, "G E"], target: ExpertTarget) -> tuple[int, ...]:
    """All experts of several tasks' sets, filled up to `target.keep` with those any of the tasks scores highest.

    A task's scores count as shares of their total. `target.keep` must hold the union (`union_size`).
    """
    wanted = {expert for chosen in sets for expert in chosen}
    share_GE = score_GE / score_GE.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return keep_best(share_GE.amax(0), replace(target, protected=tuple(sorted(wanted))))


def union_size(sets: Sequence[Sequence[int]], target: ExpertTarget) -> int:
    """The least number of experts that holds the union of the sets with equally many in every router group."""
    wanted = {expert for chosen in sets for expert in chosen}
    largest = max(sum(expert in wanted for expert in members) for members in target.group_members())
    return largest * target.num_groups
