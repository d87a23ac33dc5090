"""`similarity`: the tree against hc-smoe's own clusters and against distances by hand; pairs against the statistics."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.cluster import AgglomerativeClustering

from moetools.errors import StatisticsError
from moetools.forward.calibrate import load_statistics
from moetools.forward.options import ForwardOptions
from moetools.text.options import DataOptions
from moetools.verbs.inspect.options import RoutingOptions
from moetools.verbs.inspect.routing import inspect_routing
from moetools.verbs.inspect.similarity import Similarity, similarity

CPU = ForwardOptions(device="cpu", dtype="float32")


def quantities(mean_ED: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
    alike_EE = torch.atleast_2d(torch.corrcoef(mean_ED))
    return {
        "mean_output": {"mean": mean_ED},
        "gated_similarity": {"cosine": alike_EE},
        "router_similarity": {"similarity": -alike_EE},
    }


@pytest.mark.parametrize(("experts", "groups"), [(8, 1), (12, 3), (7, 1), (1, 1), (4, 4)])
def test_clusters_are_those_that_merging_makes(experts: int, groups: int) -> None:
    mean_ED = torch.randn(experts, 5, generator=torch.Generator().manual_seed(experts)).double()
    found = similarity(quantities(mean_ED), groups=groups)
    size = experts // groups
    expected = []
    for start in range(0, experts, size):
        members, left = list(range(start, start + size)), max(1, size // 2)
        if left == size:
            expected += [[one] for one in members]
            continue
        clustering = AgglomerativeClustering(n_clusters=left, metric="euclidean", linkage="average")
        labels = clustering.fit_predict(mean_ED[members].numpy())
        expected += [[one for one, label in zip(members, labels, strict=True) if label == c] for c in range(left)]
    assert found.half == sorted(expected)
    assert len(found.joins) == experts - groups
    for join in found.joins:
        each = [float((mean_ED[i] - mean_ED[j]).norm()) for i in join.left for j in join.right]
        assert join.distance == pytest.approx(sum(each) / len(each))
    assert [join.distance for join in found.joins] == sorted(join.distance for join in found.joins)


def test_the_most_similar_pairs_come_first() -> None:
    mean_ED = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)).double()
    found = similarity(quantities(mean_ED), groups=1)
    alike = {pair: float(torch.corrcoef(mean_ED)[pair]) for pair in itertools.combinations(range(6), 2)}
    most = sorted(alike, key=lambda pair: -alike[pair])
    assert [one.experts for one in found.by_gated_output] == most[:10]
    assert [one.experts for one in found.by_router] == most[::-1][:10]
    assert found.by_gated_output[0].similarity == pytest.approx(alike[most[0]])


def best_of_all(index: int, found: Similarity, model: Path) -> None:
    """By weights and router rows, with plain loops over the files."""
    tensors = {name: one.double() for name, one in load_file(model / "model.safetensors").items()}
    inside = {name: one for name, one in tensors.items() if f"layers.{index}." in name}
    (router,) = (
        one for name, one in inside.items() if name.endswith(("block_sparse_moe.gate.weight", "mlp.gate.weight"))
    )
    experts = [
        torch.cat([one.flatten() for name, one in inside.items() if f".experts.{number}." in name])
        for number in range(8)
    ]
    rows = list(router - router.mean(0))
    for vectors, pairs, name in ((experts, found.by_weights, "weights"), (rows, found.by_router_rows, "router rows")):
        alike = {
            (i, j): float(torch.nn.functional.cosine_similarity(vectors[i], vectors[j], dim=0))
            for i, j in itertools.combinations(range(8), 2)
        }
        assert [one.similarity for one in pairs] == pytest.approx(sorted(alike.values(), reverse=True)[:10], abs=1e-6)
        assert all(one.similarity == pytest.approx(alike[one.experts], abs=1e-6) for one in pairs)
        for join in found.trees[name]:
            each = [1 - alike[min(i, j), max(i, j)] for i in join.left for j in join.right]
            assert join.distance == pytest.approx(sum(each) / len(each), abs=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_similarity_is_measured_when_asked_for(family: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    ids, file = tmp_path / "ids.safetensors", tmp_path / "stats"
    save_file({"input_ids": torch.randint(2, 128, (6, 16), generator=torch.Generator().manual_seed(0))}, ids)
    text, model = DataOptions(data=[str(ids)], seq_len=16), tiny(family)
    plain = inspect_routing(model, RoutingOptions(save_stats=file), text, CPU)
    assert all(layer.similarity is None for layer in plain.layers)
    with pytest.raises(StatisticsError, match="lack gated_similarity, mean_output, router_similarity"):
        inspect_routing(model, RoutingOptions(stats=file, similarity=True), DataOptions(), CPU)
    asked = inspect_routing(model, RoutingOptions(save_stats=file, similarity=True), text, CPU)
    assert "experts that are alike" in [table.title for table in asked.tables()]
    statistics = load_statistics(file)
    for layer in asked.layers:
        assert layer.similarity is not None
        cosine_EE = statistics.finalized(layer.index)["gated_similarity"]["cosine"]
        best_of_all(layer.index, layer.similarity, model)
        best = max(itertools.combinations(range(8), 2), key=lambda pair, c=cosine_EE: float(c[pair]))
        assert layer.similarity.by_gated_output[0].experts == best
        groups = {expert // 4 for cluster in layer.similarity.half for expert in cluster}
        assert groups == {0, 1}
        if family == "deepseek_v3":
            assert all(len({expert // 4 for expert in cluster}) == 1 for cluster in layer.similarity.half)
