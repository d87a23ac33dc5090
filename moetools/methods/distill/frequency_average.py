"""Mean of all experts' weights, by how often each is used."""

from moetools.architectures.weights import WideExpert
from moetools.methods.distill.base import DenseInit, MoeView, averaged


class FrequencyAverage(DenseInit):
    """W = sum_e n_e W_e / sum_e n_e, n_e the slots routed to expert e; otherwise as `mean`."""

    name = "frequency-average"

    def build(self, view: MoeView) -> WideExpert:
        return averaged(view, view.weights, view.slots())


METHOD = FrequencyAverage()
