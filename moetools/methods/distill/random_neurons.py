"""Neurons drawn at random from all experts: the baseline for every way to choose them."""

import torch

from moetools.architectures.weights import WideExpert, join_experts, stack_experts
from moetools.methods.distill.base import DenseInit, MoeView, fit_width


class RandomNeurons(DenseInit):
    """W neurons of all E * F, seeded, each scaled like its expert."""

    name = "random-neurons"

    def build(self, view: MoeView) -> WideExpert:
        generator, scale_E = view.generator(), view.expert_scale()
        parts = [
            stack_experts(view.weights, (expert,)).scaled(scale_E[expert].item()) for expert in range(view.num_experts)
        ]
        whole = join_experts(parts)
        chosen = torch.randperm(whole.width, generator=generator)[: view.width].sort().values
        return fit_width(whole.only(chosen.to(whole.up_WD.device)), view.width, generator)


METHOD = RandomNeurons()
