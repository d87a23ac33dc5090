"""Random: drop experts by lot. The baseline every other method must beat."""

import torch
from jaxtyping import Float
from torch import Tensor

from moetools.methods.base import ExpertTarget, LayerStatistics
from moetools.methods.prune.base import ScorePrune


class RandomPrune(ScorePrune):
    """Score uniform in [0, 1), drawn from a generator seeded with seed * 2^20 + layer; needs no statistics."""

    name = "random"

    def scores(self, statistics: LayerStatistics, target: ExpertTarget) -> Float[Tensor, "E"]:  # noqa: ARG002
        generator = torch.Generator().manual_seed((target.seed * 2**20 + target.layer) % 2**63)
        return torch.rand(target.num_experts, generator=generator, dtype=torch.float64)


METHOD = RandomPrune()
