"""How alike the experts of a layer are, and the tree that merging by similarity would cut."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from scipy.cluster.hierarchy import linkage
from torch import Tensor

from moetools.pipeline.table import Table
from moetools.statistics.base import State
from moetools.verbs.inspect.weights_alike import WeightsAlike

SIMILARITY_NEEDS = ("gated_similarity", "mean_output", "router_similarity")
PAIRS_KEPT = 10
_SHOWN, _CLUSTERS_SHOWN = 2, 6


@dataclass(frozen=True, kw_only=True)
class Join:
    """Two clusters that become one.

    Attributes:
        left, right: their experts, ascending.
        distance: mean distance of the mean outputs of all pairs between them.
    """

    left: list[int]
    right: list[int]
    distance: float


@dataclass(frozen=True, kw_only=True)
class Alike:
    """Two experts i < j and how similar they are, 1 at most."""

    experts: tuple[int, int]
    similarity: float


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """One layer.

    Attributes:
        joins: the tree of `merge-experts` with the method hc-smoe, by distance: average linkage on Euclidean distances
            of mean outputs, inside each router group.
        half: the clusters of that tree when half of the experts are left in each router group, by first expert.
        by_gated_output, by_router: the 10 most similar pairs, by cosine of gated outputs over the tokens
            (`statistics.gated_similarity`) and by correlation of router logits (`statistics.router_similarity`).
        by_weights, by_router_rows: the same by `WeightsAlike`; empty where the weights were not read.
        trees: the tree by each of these similarities: average linkage on 1 - similarity, inside each router group.
    """

    joins: list[Join]
    half: list[list[int]]
    by_gated_output: list[Alike]
    by_router: list[Alike]
    by_weights: list[Alike]
    by_router_rows: list[Alike]
    trees: Mapping[str, list[Join]]


def similarity(quantities: Mapping[str, State], *, groups: int, weights: WeightsAlike | None = None) -> Similarity:
    """From `SIMILARITY_NEEDS` of a layer whose router has so many groups of consecutive experts, and its weights."""
    mean_ED = quantities["mean_output"]["mean"]
    size = len(mean_ED) // groups
    trees = _trees(torch.cdist(mean_ED, mean_ED, compute_mode="donot_use_mm_for_euclid_dist"), size)
    halves = [cluster for number, tree in enumerate(trees) for cluster in _cut(tree, number * size, size)]
    alike = {
        "gated outputs": quantities["gated_similarity"]["cosine"],
        "router logits": quantities["router_similarity"]["similarity"],
    }
    if weights is not None:
        alike |= {"weights": weights.weights_EE, "router rows": weights.router_EE}
    pairs = {name: _pairs(alike_EE) for name, alike_EE in alike.items()}
    return Similarity(
        joins=_by_distance(trees),
        half=sorted(halves),
        by_gated_output=pairs["gated outputs"],
        by_router=pairs["router logits"],
        by_weights=pairs.get("weights", []),
        by_router_rows=pairs.get("router rows", []),
        trees={name: _by_distance(_trees(1 - alike_EE.double(), size)) for name, alike_EE in alike.items()},
    )


def _by_distance(trees: list[list[Join]]) -> list[Join]:
    return sorted((join for tree in trees for join in tree), key=lambda join: join.distance)


def _trees(distance_EE: Tensor, size: int) -> list[list[Join]]:
    """A tree for every `size` consecutive experts."""
    starts = range(0, len(distance_EE), size)
    return [_tree(distance_EE[start : start + size, start : start + size], start) for start in starts]


def _tree(distance_EE: Tensor, first: int) -> list[Join]:
    """Joins in the order of the linkage; `first` is the number of the first expert."""
    if len(distance_EE) < 2:
        return []
    clusters = [[first + expert] for expert in range(len(distance_EE))]
    joins = []
    row, column = torch.triu_indices(len(distance_EE), len(distance_EE), offset=1)
    # Rounding may put the similarity of two equal experts above 1.
    flat = distance_EE[row, column].clamp_min(0).numpy()
    for left, right, distance, _ in linkage(flat, method="average").tolist():
        one, other = sorted((clusters[int(left)], clusters[int(right)]))
        joins.append(Join(left=one, right=other, distance=distance))
        clusters.append(sorted(one + other))
    return joins


def _cut(tree: list[Join], first: int, size: int) -> list[list[int]]:
    """Clusters when half of the experts, rounded down, but one at least, are left."""
    clusters = [[first + expert] for expert in range(size)]
    for join in tree[: size - max(1, size // 2)]:
        clusters = [one for one in clusters if one not in (join.left, join.right)]
        clusters.append(sorted(join.left + join.right))
    return clusters


def _pairs(similarity_EE: Tensor) -> list[Alike]:
    first, second = torch.triu_indices(len(similarity_EE), len(similarity_EE), offset=1)
    order = similarity_EE[first, second].argsort(descending=True, stable=True)[:PAIRS_KEPT]
    pairs = zip(first[order].tolist(), second[order].tolist(), strict=True)
    return [Alike(experts=(i, j), similarity=float(similarity_EE[i, j])) for i, j in pairs]


def similarity_table(layers: Mapping[int, Similarity]) -> Table:
    """One row per layer."""
    rows = [[str(index), _clusters(layer.half), *map(_said, _most_alike(layer))] for index, layer in layers.items()]
    note = (
        "merged at half: clusters of several experts if half are left, as merge-experts with the method hc-smoe would "
        "make them (average linkage of mean outputs); most alike: cosine of gated outputs, correlation of router "
        "logits, cosine of all weights, cosine of router rows less their mean"
    )
    columns = [
        "layer",
        "merged at half",
        "most alike by gated outputs",
        "by router logits",
        "by weights",
        "by router rows",
    ]
    return Table(title="experts that are alike", columns=columns, rows=rows, note=note)


def _most_alike(layer: Similarity) -> tuple[list[Alike], ...]:
    return layer.by_gated_output, layer.by_router, layer.by_weights, layer.by_router_rows


def _clusters(clusters: list[list[int]]) -> str:
    several = sorted((one for one in clusters if len(one) > 1), key=lambda one: (-len(one), one))
    more = f"  and {len(several) - _CLUSTERS_SHOWN} more" if len(several) > _CLUSTERS_SHOWN else ""
    return "  ".join("+".join(map(str, one)) for one in several[:_CLUSTERS_SHOWN]) + more or "none"


def _said(pairs: list[Alike]) -> str:
    return "  ".join(f"{one.experts[0]}+{one.experts[1]}: {one.similarity:.2f}" for one in pairs[:_SHOWN]) or "none"
