"""CP: the experts whose tokens give them the most weight, side by side."""

from moetools.architectures.weights import WideExpert
from moetools.methods.distill.base import DenseInit, MoeView, best_experts, contribution


class ContributionProbability(DenseInit):
    """The experts of highest CP_e = E[g_e(x) | e is selected], concatenated and scaled. Source: arXiv 2605.28207."""

    name = "cp"

    def build(self, view: MoeView) -> WideExpert:
        return best_experts(view, contribution(view))


METHOD = ContributionProbability()
