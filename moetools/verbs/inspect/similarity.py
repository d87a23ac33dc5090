"""How alike the experts of a layer are, and the tree that merging by similarity would cut."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from scipy.cluster.hierarchy import linkage
from torch import Tensor

from moetools.pipeline.table import Table
from moetools.statistics.base import State

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
    """

    joins: list[Join]
    half: list[list[int]]
    by_gated_output: list[Alike]
    by_router: list[Alike]


def similarity(quantities: Mapping[str, State], *, groups: int) -> Similarity:
    """From `SIMILARITY_NEEDS` of a layer whose router has so many groups of consecutive experts."""
    mean_ED = quantities["mean_output"]["mean"]
    size = len(mean_ED) // groups
    trees = [_tree(mean_ED[start : start + size], start) for start in range(0, len(mean_ED), size)]
    halves = [cluster for number, tree in enumerate(trees) for cluster in _cut(tree, number * size, size)]
    return Similarity(
        joins=sorted((join for tree in trees for join in tree), key=lambda join: join.distance),
        half=sorted(halves),
        by_gated_output=_pairs(quantities["gated_similarity"]["cosine"]),
        by_router=_pairs(quantities["router_similarity"]["similarity"]),
    )


def _tree(mean_ED: Tensor, first: int) -> list[Join]:
    """Joins in the order of the linkage; `first` is the number of the first expert."""
    if len(mean_ED) < 2:
        return []
    clusters = [[first + expert] for expert in range(len(mean_ED))]
    joins = []
    for left, right, distance, _ in linkage(mean_ED.numpy(), method="average", metric="euclidean").tolist():
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
    rows = [
        [str(index), _clusters(layer.half), _said(layer.by_gated_output), _said(layer.by_router)]
        for index, layer in layers.items()
    ]
    note = (
        "merged at half: clusters of several experts if half are left, as merge-experts with the method hc-smoe would "
        "make them (average linkage of mean outputs); most alike: cosine of gated outputs, correlation of router logits"
    )
    columns = ["layer", "merged at half", "most alike by gated outputs", "by router logits"]
    return Table(title="experts that are alike", columns=columns, rows=rows, note=note)


def _clusters(clusters: list[list[int]]) -> str:
    several = sorted((one for one in clusters if len(one) > 1), key=lambda one: (-len(one), one))
    more = f"  and {len(several) - _CLUSTERS_SHOWN} more" if len(several) > _CLUSTERS_SHOWN else ""
    return "  ".join("+".join(map(str, one)) for one in several[:_CLUSTERS_SHOWN]) + more or "none"


def _said(pairs: list[Alike]) -> str:
    return "  ".join(f"{one.experts[0]}+{one.experts[1]}: {one.similarity:.2f}" for one in pairs[:_SHOWN]) or "none"
