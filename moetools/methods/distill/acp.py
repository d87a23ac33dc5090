"""ACP: the experts of the largest weighted activation, side by side."""

from moetools.architectures.weights import WideExpert
from moetools.methods.distill.base import DenseInit, MoeView, best_experts, contribution, output_gram


class ActivationContribution(DenseInit):
    """The experts of highest ACP_e = CP_e * sqrt(E ||f_e(x)||^2), concatenated and scaled. Source: arXiv 2605.28207."""

    name = "acp"

    def build(self, view: MoeView) -> WideExpert:
        return best_experts(view, contribution(view) * output_gram(view).diagonal().sqrt())


METHOD = ActivationContribution()
