"""Initialisations of a dense FFN against what their definitions say, computed another way."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moetools.architectures.weights import LayerWeights, WideExpert, join_experts, stack_experts
from moetools.errors import StatisticsError
from moetools.methods.base import LayerSample
from moetools.methods.distill.base import MoeView, fit_width, largest_neurons
from moetools.methods.distill.do_acp import greedy_determinant
from moetools.plugins import load_plugin, plugin_names

E, F, D, N, K = 6, 5, 7, 40, 2
NAMES = plugin_names("moetools.methods.distill")


def activate(gate: Tensor | None, up: Tensor) -> Tensor:
    assert gate is not None
    return functional.silu(gate) * up


def never(*_: Any) -> Any:
    raise AssertionError("nothing is routed")


def view(width: int = 2 * F, scaling: Any = "uniform", alike: bool = False) -> MoeView:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        tensor = torch.randn(*size, generator=generator)
        return tensor[:1].expand(*size).clone() if alike else tensor

    slots = torch.tensor([[30, 10, 5, 20, 0, 15]])
    mass = torch.tensor([[18.0, 4.0, 3.5, 9.0, 0.0, 5.5]], dtype=torch.float64)
    statistics = {
        "load": {"slots": slots},
        "router": {"gate_mass": mass},
        "reap": {"saliency": torch.tensor([3.0, 1.0, 2.0, 5.0, 0.0, 4.0], dtype=torch.float64)},
    }
    weights = LayerWeights(
        gate_EFD=draw(E, F, D), up_EFD=draw(E, F, D), down_EDF=draw(E, D, F), router_ED=torch.randn(E, D)
    )
    hidden = torch.randn(N, D, generator=generator)
    sample = LayerSample(hidden_ND=hidden, logits_NE=torch.zeros(N, E), activate=activate, route=never)
    return MoeView(
        layer=1, width=width, top_k=K, weights=weights, statistics=statistics, sample=sample, scaling=scaling
    )


def build(name: str, on: MoeView) -> WideExpert:
    return load_plugin("moetools.methods.distill", name, kind="initialisation").METHOD.build(on)


def output(ffn: WideExpert, hidden: Tensor) -> Tensor:
    assert ffn.gate_WD is not None
    return activate(hidden @ ffn.gate_WD.T, hidden @ ffn.up_WD.T) @ ffn.down_DW.T


def expert(weights: LayerWeights, number: int, hidden: Tensor) -> Tensor:
    assert weights.gate_EFD is not None
    inner = functional.silu(hidden @ weights.gate_EFD[number].T) * (hidden @ weights.up_EFD[number].T)
    return inner @ weights.down_EDF[number].T


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [3, F, 2 * F, 4 * F + 2, E * F, E * F + 9])
def test_every_initialisation_has_the_width_asked_for(name: str, width: int) -> None:
    ffn = build(name, view(width))
    plugin = load_plugin("moetools.methods.distill", name, kind="initialisation").METHOD
    assert ffn.width == (E * F if plugin.wide else width)
    assert ffn.up_WD.dtype == torch.float32
    assert all(tensor.isfinite().all() for tensor in ffn.__dict__.values() if tensor is not None)


@pytest.mark.parametrize("name", NAMES)
def test_every_initialisation_is_seeded(name: str) -> None:
    one, other = build(name, view()), build(name, view())
    assert torch.equal(one.down_DW, other.down_DW)
    assert torch.equal(one.up_WD, other.up_WD)


@pytest.mark.parametrize("name", ["mean", "frequency-average", "saliency-average", "aligned-average"])
def test_averages_of_equal_experts_are_that_expert_at_the_routers_total_weight(name: str) -> None:
    """40 tokens, routing weights that sum to 40: on average a token gets weight 1."""
    on = view(alike=True)
    hidden = torch.randn(9, D)
    assert torch.allclose(output(build(name, on), hidden), expert(on.weights, 0, hidden), atol=1e-5)


def test_averages_weigh_as_they_say() -> None:
    on = view(width=F)
    shares = {
        "mean": torch.full((E,), 1 / E),
        "frequency-average": torch.tensor([30.0, 10, 5, 20, 0, 15]) / 80,
        "saliency-average": torch.tensor([3.0, 1, 2, 5, 0, 4]) / 15,
    }
    for name, share in shares.items():
        meant = torch.einsum("e,efd->fd", share, on.weights.up_EFD)
        assert torch.allclose(build(name, on).up_WD, meant, atol=1e-6), name


def chosen(on: MoeView, score: list[float], count: int) -> set[int]:
    return set(sorted(range(E), key=lambda one: -score[one])[:count])


@pytest.mark.parametrize(("scaling", "factor"), [("uniform", lambda _: 1 / K), ("marginal", lambda mass: mass / 40)])
def test_cp_and_acp_concatenate_the_best_experts(scaling: str, factor: Any) -> None:
    on = view(2 * F, scaling)
    mass, slots = [18.0, 4.0, 3.5, 9.0, 0.0, 5.5], [30, 10, 5, 20, 0, 15]
    cp = [weight / count if count else 0.0 for weight, count in zip(mass, slots, strict=True)]
    size = [expert(on.weights, one, on.sample.hidden_ND).square().sum(1).mean().sqrt().item() for one in range(E)]
    hidden = torch.randn(9, D)
    for name, score in (("cp", cp), ("acp", [one * other for one, other in zip(cp, size, strict=True)])):
        members = chosen(on, score, 2)
        meant = sum(factor(mass[one]) * expert(on.weights, one, hidden) for one in members)
        assert torch.allclose(output(build(name, on), hidden), meant, atol=1e-5), name


def test_greedy_determinant_takes_the_best_next_expert_every_time() -> None:
    root = torch.randn(7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    kernel = root @ root.T
    order = greedy_determinant(kernel)
    ridged = kernel + 1e-3 * kernel.diagonal().mean() * torch.eye(7, dtype=torch.float64)
    picked: list[int] = []
    for _ in range(7):
        rest = [one for one in range(7) if one not in picked]
        best = max(rest, key=lambda one: torch.linalg.det(ridged[[*picked, one]][:, [*picked, one]]).item())
        picked.append(best)
    assert order == picked


def test_do_acp_avoids_a_copy_of_what_it_has() -> None:
    """Two equal experts of the largest contribution: the second adds no volume, another one does."""
    on = view(2 * F)
    weights = on.weights
    for tensor in weights.tensors().values():
        if tensor is not weights.router_ED:
            tensor[3] = tensor[0]
    scores = {name: build(name, on) for name in ("acp", "do-acp")}
    copies = {
        name: any(
            torch.equal(ffn.up_WD[:F], weights.up_EFD[one]) and torch.equal(ffn.up_WD[F:], weights.up_EFD[other])
            for one, other in itertools.product((0, 3), (0, 3))
        )
        for name, ffn in scores.items()
    }
    assert not copies["do-acp"]


def test_top_kg_takes_the_largest_neurons_of_every_expert() -> None:
    on = view(E * 2)
    ffn = build("top-kg", on)
    weights = on.weights
    assert weights.gate_EFD is not None
    for number in range(E):
        size = weights.gate_EFD[number].norm(dim=1) * weights.up_EFD[number].norm(dim=1)
        size = size * weights.down_EDF[number].norm(dim=0)
        best = sorted(range(F), key=lambda one: -size[one])[:2]
        found = ffn.up_WD[2 * number : 2 * number + 2]
        assert torch.equal(found, weights.up_EFD[number][sorted(best)])
        assert torch.allclose(ffn.down_DW[:, 2 * number], weights.down_EDF[number][:, sorted(best)[0]] / K)


def test_svd_kg_keeps_the_leading_directions() -> None:
    """All directions of an expert are its own weights, rotated: no direction is lost, and the first is the largest."""
    on = view(E * F)
    ffn = build("svd-kg", on)
    weights = on.weights
    assert weights.gate_EFD is not None
    assert ffn.gate_WD is not None
    for number in range(E):
        rows = slice(number * F, number * F + F)
        whole = torch.cat((weights.gate_EFD[number], weights.up_EFD[number], weights.down_EDF[number].T), 1)
        found = torch.cat((ffn.gate_WD[rows], ffn.up_WD[rows], K * ffn.down_DW[:, rows].T), 1)
        assert torch.allclose(found.T @ found, whole.T @ whole, atol=1e-4)
        assert torch.allclose(found.norm(dim=1), torch.linalg.svdvals(whole), atol=1e-4)


def test_merge_concatenate_with_room_for_all_is_all_experts() -> None:
    on = view(E * F, "marginal")
    hidden = torch.randn(9, D)
    mass = [18.0, 4.0, 3.5, 9.0, 0.0, 5.5]
    meant = sum(mass[one] / 40 * expert(on.weights, one, hidden) for one in range(E))
    assert torch.allclose(output(build("merge-concatenate", on), hidden), meant, atol=1e-5)


def test_added_neurons_change_nothing_and_can_be_trained() -> None:
    ffn = stack_experts(view().weights, (2,))
    wide = fit_width(ffn, F + 4, torch.Generator().manual_seed(0))
    hidden = torch.randn(9, D)
    assert torch.allclose(output(wide, hidden), output(ffn, hidden), atol=1e-6)
    assert wide.up_WD[F:].norm(dim=1).min() > 0


def test_fewer_neurons_are_the_largest() -> None:
    ffn = stack_experts(view().weights, (2,))
    assert ffn.gate_WD is not None
    size = ffn.gate_WD.norm(dim=1) * ffn.up_WD.norm(dim=1) * ffn.down_DW.norm(dim=0)
    assert torch.equal(largest_neurons(ffn, 2).up_WD, ffn.up_WD[sorted(size.argsort(descending=True)[:2].tolist())])


def test_joining_adds_outputs_and_biases() -> None:
    parts = [stack_experts(view().weights, (one,)) for one in (1, 4)]
    hidden = torch.randn(9, D)
    joined = join_experts(parts)
    assert torch.allclose(output(joined, hidden), sum(output(part, hidden) for part in parts), atol=1e-5)
    biased = [
        WideExpert(**{**part.__dict__, "down_bias_D": torch.full((D,), float(n))}) for n, part in enumerate(parts)
    ]
    bias = join_experts(biased).down_bias_D
    assert bias is not None
    assert bias.tolist() == [1.0] * D
    assert torch.allclose(output(parts[0].scaled(0.3), hidden), 0.3 * output(parts[0], hidden), atol=1e-6)


def test_a_missing_statistic_is_named() -> None:
    on = view()
    bare = MoeView(**{**on.__dict__, "statistics": {"load": on.statistics["load"]}})
    with pytest.raises(StatisticsError, match="'router'"):
        build("cp", bare)
