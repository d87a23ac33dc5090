"""All experts' neurons; the warm start keeps those that the layer's output needs most."""

from moetools.architectures.weights import WideExpert, join_experts, stack_experts
from moetools.methods.distill.base import DenseInit, MoeView


class Neurons(DenseInit):
    """Every neuron of every expert, scaled like its expert.

    The warm start then drops neurons such that the best joint refit of the down projection loses little
    (`methods.neurons`). Ours; measured against the others in docs/benchmarks.md.
    """

    name = "neurons"
    wide = True

    def build(self, view: MoeView) -> WideExpert:
        scale_E = view.expert_scale()
        experts = range(view.num_experts)
        return join_experts([stack_experts(view.weights, (one,)).scaled(scale_E[one].item()) for one in experts])


METHOD = Neurons()
