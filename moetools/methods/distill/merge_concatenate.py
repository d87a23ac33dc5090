"""Merge similar experts into as many as fit into the width, then put them side by side."""

import numpy
from sklearn.cluster import AgglomerativeClustering

from moetools.architectures.weights import WideExpert
from moetools.methods.alignment import align_cluster
from moetools.methods.base import ExpertDecision
from moetools.methods.distill.base import (
    DenseInit,
    MoeView,
    average,
    concatenate,
    fit_width,
    output_gram,
)


class MergeConcatenate(DenseInit):
    """ceil(W / F) clusters of experts, each the aligned, frequency-weighted mean of its members, concatenated.

    Clusters: average linkage on 1 - cos(f_i, f_j) over the sampled tokens. A cluster's mean is scaled by what its
    members' scales add up to under "marginal", or by the mean total routing weight over the number of clusters.
    """

    name = "merge-concatenate"

    def build(self, view: MoeView) -> WideExpert:
        count = min(view.num_experts, -(-view.width // view.weights.up_EFD.shape[1]))
        slots_E = view.slots()
        clusters = [
            tuple(sorted(members, key=lambda expert: (-slots_E[expert].item(), expert)))
            for members in _clusters(view, count)
        ]
        clusters.sort(key=lambda members: -sum(slots_E[member].item() for member in members))
        shares = [_shares([slots_E[member].item() for member in members]) for members in clusters]
        decision = ExpertDecision(clusters=tuple(clusters), weights=tuple(shares), details={})
        aligned = align_cluster(view.weights, decision, lambda expert: view.sample.intermediate(view.weights, expert))
        mass_E = view.gate_mass()
        uniform = mass_E.sum().item() / count
        parts = []
        for members, weights in zip(clusters, shares, strict=True):
            scale = mass_E[list(members)].sum().item() if view.scaling == "marginal" else uniform
            parts.append(average(aligned, members, weights).scaled(scale))
        return fit_width(concatenate(parts, view.width), view.width, view.generator())


def _clusters(view: MoeView, count: int) -> list[list[int]]:
    if count == view.num_experts:
        return [[expert] for expert in range(count)]
    gram_EE = output_gram(view).numpy()
    size_E = numpy.sqrt(numpy.maximum(numpy.diagonal(gram_EE), numpy.finfo(float).tiny))
    distance_EE = numpy.clip(1 - gram_EE / numpy.outer(size_E, size_E), 0, None)
    numpy.fill_diagonal(distance_EE, 0)
    labels = AgglomerativeClustering(n_clusters=count, metric="precomputed", linkage="average").fit_predict(distance_EE)
    return [numpy.flatnonzero(labels == label).tolist() for label in range(count)]


def _shares(slots: list[float]) -> tuple[float, ...]:
    total = sum(slots)
    return tuple(one / total for one in slots) if total else (1 / len(slots),) * len(slots)


METHOD = MergeConcatenate()
