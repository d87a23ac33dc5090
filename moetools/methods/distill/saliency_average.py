"""Mean of all experts' weights, by REAP saliency."""

from moetools.architectures.weights import WideExpert
from moetools.methods.distill.base import DenseInit, MoeView, averaged


class SaliencyAverage(DenseInit):
    """W = sum_e S_e W_e / sum_e S_e, S_e the REAP saliency (arXiv 2510.13999); otherwise as `mean`."""

    name = "saliency-average"
    needs = ("load", "reap", "router")

    def build(self, view: MoeView) -> WideExpert:
        return averaged(view, view.weights, view.quantity("reap", "saliency"))


METHOD = SaliencyAverage()
