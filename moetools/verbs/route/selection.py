"""Which experts each task gets, how far the tasks' experts differ, and what that is worth beside chance.

Letters: G tasks, E experts, L layers.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from moetools.architectures.base import Architecture
from moetools.errors import UserError
from moetools.forward.calibrate import ModelStatistics
from moetools.methods.base import ExpertTarget
from moetools.methods.prune.base import super_experts
from moetools.methods.route.base import (
    RouteScore,
    TaskLabels,
    count_for_share,
    keep_best,
    score_share,
    union_of,
    union_size,
)

NULL_DRAWS = 20
_MIN_GUARDED = 200
Sets = Mapping[int, tuple[int, ...]]
"""Layer -> experts, ascending."""


@dataclass(frozen=True, kw_only=True)
class TaskSets:
    """The experts of one output.

    Attributes:
        name: a task, or the tasks of a union joined by `+`.
        tasks: the tasks it serves.
        keep: experts per layer.
        experts: layer -> experts.
        share: layer -> part of the task's total score that they have; of a union's tasks the least.
        needed: layer -> experts that top-p alone would need, or that the union holds; None with a fixed number.
    """

    name: str
    tasks: tuple[str, ...]
    keep: int
    experts: Sets
    share: Mapping[int, float]
    needed: Mapping[int, int] | None


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Jaccard overlap |A and B| / |A or B| of the tasks' expert sets.

    Attributes:
        tasks: their names, in the order of rows and columns.
        layers: layer -> G x G.
        mean: over layers and pairs of different tasks.
        null_mean, null_low: the same mean when sequences are dealt out to tasks at random (20 draws): its mean, and the
            lowest draw. Real specialization overlaps less than every draw.
        same_size: what two random sets of these sizes would overlap by.
    """

    tasks: tuple[str, ...]
    layers: Mapping[int, list[list[float]]]
    mean: float
    null_mean: float
    null_low: float
    same_size: float


class Selector:
    """Scores of all tasks, and what follows from them.

    Args:
        statistics: measured with every sequence as a task of its own.
        labels: the sequences' tasks.
    """

    def __init__(
        self,
        statistics: ModelStatistics,
        labels: TaskLabels,
        score: RouteScore,
        arch: Architecture,
        config: Mapping[str, object],
    ) -> None:
        self.labels, self._score, self._arch, self._config = labels, score, arch, config
        self._groups = arch.num_groups(config)
        self._finalized = {layer: statistics.finalized(layer) for layer in statistics.layers}
        self._count = statistics.shape.num_experts
        peaks = {layer: found["max_activation"]["peak"] for layer, found in self._finalized.items() if score.guarded}
        # Among fewer experts the 99.5th percentile lies below the largest peak, and there would always be one.
        self._protected = super_experts(peaks) if self._count * len(peaks) >= _MIN_GUARDED else {}
        self.scores = self._scores(labels)

    @property
    def layers(self) -> list[int]:
        return list(self._finalized)

    def _scores(self, labels: TaskLabels) -> dict[int, Float[Tensor, "G E"]]:
        whole = self._count
        return {
            layer: self._score.scores(found, self._target(layer, whole), labels)
            for layer, found in self._finalized.items()
        }

    def _target(self, layer: int, keep: int) -> ExpertTarget:
        return ExpertTarget(
            num_experts=self._count,
            keep=keep,
            num_groups=self._groups,
            layer=layer,
            protected=self._protected.get(layer, ()),
        )

    def task_sets(self, task: int, name: str, keep: int | None, top_p: float | None) -> TaskSets:
        """The experts of one task: `keep` of them, or as many as its most demanding layer needs for `top_p`."""
        needed = None
        if top_p is not None:
            needed = {
                layer: count_for_share(score_GE[task], top_p, self._groups) for layer, score_GE in self.scores.items()
            }
            keep = self.legal_count(max(needed.values()))
        assert keep is not None
        experts = {
            layer: keep_best(score_GE[task], self._target(layer, keep)) for layer, score_GE in self.scores.items()
        }
        share = {layer: score_share(score_GE[task], experts[layer]) for layer, score_GE in self.scores.items()}
        return TaskSets(name=name, tasks=(name,), keep=keep, experts=experts, share=share, needed=needed)

    def union(self, parts: Sequence[TaskSets], tasks: Sequence[int]) -> TaskSets:
        """All experts of several tasks; layers that need fewer than the most demanding one are filled up."""
        sets = {layer: [part.experts[layer] for part in parts] for layer in self.layers}
        needed = {layer: union_size(found, self._target(layer, self._groups)) for layer, found in sets.items()}
        keep = self.legal_count(max(needed.values()))
        rows = list(tasks)
        experts = {
            layer: union_of(found, self.scores[layer][rows], self._target(layer, keep)) for layer, found in sets.items()
        }
        share = {
            layer: min(score_share(self.scores[layer][task], experts[layer]) for task in rows) for layer in self.layers
        }
        names = tuple(part.name for part in parts)
        return TaskSets(name="+".join(names), tasks=names, keep=keep, experts=experts, share=share, needed=needed)

    def legal_count(self, least: int) -> int:
        """The least number of experts, `least` or more, that the family's router can serve."""
        for count in range(max(least, self._arch.top_k(self._config) or 1), self._count + 1):
            try:
                self._arch.check_expert_count(self._config, count)
            except UserError:
                continue
            return count
        return self._count

    def legal_counts(self) -> list[int]:
        """All numbers of experts the router can serve."""
        found: list[int] = []
        while not found or found[-1] < self._count:
            found.append(self.legal_count(found[-1] + 1 if found else 1))
        return found

    def share_curve(self, count: int) -> dict[int, float]:
        """Task -> part of its score that its `count` best experts have, mean over layers."""
        shares: dict[int, float] = {}
        for task in range(self.labels.num_tasks):
            found = [
                score_share(score_GE[task], keep_best(score_GE[task], self._target(layer, count)))
                for layer, score_GE in self.scores.items()
            ]
            shares[task] = sum(found) / len(found)
        return shares

    def overlap(self, sets: Sequence[TaskSets], seed: int) -> Overlap:
        """How far the tasks' experts differ, beside sequences dealt out at random."""
        layers = {layer: _matrix([one.experts[layer] for one in sets]) for layer in self.layers}
        generator = torch.Generator().manual_seed(seed)
        draws = []
        for _ in range(NULL_DRAWS):
            scores = self._scores(self.labels.shuffled(generator))
            null = {
                layer: _matrix(
                    [keep_best(score_GE[row], self._target(layer, one.keep)) for row, one in enumerate(sets)]
                )
                for layer, score_GE in scores.items()
            }
            draws.append(_mean_off_diagonal(null))
        return Overlap(
            tasks=tuple(one.name for one in sets),
            layers=layers,
            mean=_mean_off_diagonal(layers),
            null_mean=sum(draws) / len(draws),
            null_low=min(draws),
            same_size=_random_overlap([one.keep for one in sets], self._count),
        )


def jaccard(one: Sequence[int], other: Sequence[int]) -> float:
    """|A and B| / |A or B|; 1 for two empty sets."""
    together = set(one) | set(other)
    return len(set(one) & set(other)) / len(together) if together else 1.0


def _matrix(sets: Sequence[Sequence[int]]) -> list[list[float]]:
    return [[jaccard(one, other) for other in sets] for one in sets]


def _mean_off_diagonal(layers: Mapping[int, list[list[float]]]) -> float:
    values = [
        matrix[row][column]
        for matrix in layers.values()
        for row, column in itertools.combinations(range(len(matrix)), 2)
    ]
    return sum(values) / len(values)


def _random_overlap(sizes: Sequence[int], count: int) -> float:
    """Overlap of random sets, with the expected intersection in place of the mean over draws."""
    pairs = [(a, b, a * b / count) for a, b in itertools.combinations(sizes, 2)]
    return sum(shared / (a + b - shared) for a, b, shared in pairs) / len(pairs)
