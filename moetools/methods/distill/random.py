"""A random FFN: the baseline that takes nothing from the experts."""

import torch
from torch import Tensor

from moetools.architectures.weights import WideExpert, stack_experts
from moetools.methods.distill.base import DenseInit, MoeView


class Random(DenseInit):
    """Gaussian rows with the root mean square of the experts' gate, up and down weights, seeded."""

    name = "random"

    def build(self, view: MoeView) -> WideExpert:
        generator = view.generator()
        whole = stack_experts(view.weights, tuple(range(view.num_experts)))

        def drawn(like: Tensor, *size: int) -> Tensor:
            return like.square().mean().sqrt() * torch.randn(*size, generator=generator).to(like)

        hidden = whole.up_WD.shape[1]
        return WideExpert(
            up_WD=drawn(whole.up_WD, view.width, hidden),
            down_DW=drawn(whole.down_DW, hidden, view.width),
            gate_WD=None if whole.gate_WD is None else drawn(whole.gate_WD, view.width, hidden),
        )


METHOD = Random()
