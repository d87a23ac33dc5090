"""Mean of all experts' weights after their neurons were put in one order."""

from moetools.architectures.weights import WideExpert
from moetools.methods.alignment import align_cluster
from moetools.methods.base import ExpertDecision
from moetools.methods.distill.base import DenseInit, MoeView, averaged


class AlignedAverage(DenseInit):
    """As `frequency-average`, with every expert's neurons permuted to match those of the most used expert.

    The permutation is the Hungarian assignment of `methods.alignment`, by weights and activations.
    """

    name = "aligned-average"

    def build(self, view: MoeView) -> WideExpert:
        slots_E = view.slots()
        order = slots_E.argsort(descending=True, stable=True).tolist()
        equal = (1 / view.num_experts,) * view.num_experts
        cluster = ExpertDecision(clusters=(tuple(order),), weights=(equal,), details={})
        aligned = align_cluster(view.weights, cluster, lambda expert: view.sample.intermediate(view.weights, expert))
        return averaged(view, aligned, slots_E)


METHOD = AlignedAverage()
