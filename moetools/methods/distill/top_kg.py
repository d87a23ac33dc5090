"""Top-KG: the largest neurons of every expert, side by side."""

from moetools.architectures.weights import WideExpert, stack_experts
from moetools.methods.distill.base import DenseInit, MoeView, concatenate, fit_width, largest_neurons


class TopKG(DenseInit):
    """From each of E experts the W / E neurons of the largest norm, their down columns scaled.

    Source: "knowledge gathering" by norm in OneS (arXiv 2201.10890, section 3); the norm of a gated neuron is the
    product of the norms of its gate row, up row and down column.
    """

    name = "top-kg"

    def build(self, view: MoeView) -> WideExpert:
        scale_E = view.expert_scale()
        quota, rest = divmod(view.width, view.num_experts)
        parts = []
        for expert in range(view.num_experts):
            count = quota + (expert < rest)
            if count:
                whole = stack_experts(view.weights, (expert,)).scaled(scale_E[expert].item())
                parts.append(largest_neurons(whole, count))
        return fit_width(concatenate(parts, view.width), view.width, view.generator())


METHOD = TopKG()
