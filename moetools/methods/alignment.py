"""Neuron alignment: reorder an expert's neurons to match another's, so that averaging the two averages like with like.

An expert computes the same function whatever the order of its F neurons, so alignment changes no output. Cost: one
[F, F] assignment per merged expert, O(F^3) at worst; on one CPU core about 0.05 s at F = 768, 0.3 s at 1,536 and 2 s
at 3,072, growing about eightfold per doubling.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moetools.architectures.weights import LayerWeights
from moetools.errors import StatisticsError
from moetools.methods.base import ExpertDecision

NEURON_DIM = {"gate_EFD": 1, "up_EFD": 1, "gate_bias_EF": 1, "up_bias_EF": 1, "down_EDF": 2}
"""The tensors of `LayerWeights` that have a neuron dimension F, and where."""


def align_neurons(
    weights: LayerWeights,
    member: int,
    centroid: int,
    *,
    activations: tuple[Float[Tensor, "N F"], Float[Tensor, "N F"]] | None = None,
) -> Int[Tensor, "F"]:
    """The order of the member's neurons that matches the centroid's best: neuron `result[i]` belongs in place i.

    Minimises sum over i of cost(i, result[i]) over all permutations, exactly (Hungarian assignment), with

        cost(i, j) = d(a_i, a'_j) + mean over parts p of d(w_pi, w'_pj),    d(u, v) = ||u - v||^2 / s

    a_i [N] the intermediates of the centroid's neuron i on N tokens, a'_j the member's on the same tokens; parts: the
    neuron's row of gate, its row of up (each with its bias, where there is one), its column of down. s is the mean
    squared norm of the two experts' vectors of that kind, so activations weigh as much as weights, and every part as
    much as any other. Without activations the first term is absent.

    Args:
        activations: (member's, centroid's) intermediates on the same tokens.

    Returns:
        int64 [F] on the CPU; the identity where member and centroid are the same neuron for neuron.

    Raises:
        StatisticsError: weights or activations are not finite.

    Source: the cost of REAM (arXiv 2604.04356), without its reduction of the weights to principal components.
    """
    pairs = list(zip(_neuron_parts(weights, member), _neuron_parts(weights, centroid), strict=True))
    cost_FF = sum((_distance(theirs, own) for own, theirs in pairs), torch.zeros(())) / len(pairs)
    if activations is not None:
        own_NF, their_NF = activations
        cost_FF = cost_FF + _distance(their_NF.float().T, own_NF.float().T)
    if not cost_FF.isfinite().all():
        raise StatisticsError(
            f"the neurons of expert {member} cannot be aligned to expert {centroid}: weights or activations not finite",
            hint="the weights hold NaN or infinity, or a float16 pass overflowed: try `dtype=float32`",
        )
    _, order = linear_sum_assignment(cost_FF.cpu().numpy())
    return torch.from_numpy(order).long()


def align_cluster(
    weights: LayerWeights, decision: ExpertDecision, intermediates: Callable[[int], Float[Tensor, "N F"]] | None = None
) -> LayerWeights:
    """The same layer with the neurons of every cluster's members in the order of its first member's.

    No expert's function changes beyond the rounding of sums. `combine_experts` may follow. Experts outside the decision
    and first members are bit-identical; without a cluster of two or more, `weights` itself is returned.

    Args:
        intermediates: expert -> its intermediates on tokens that are the same for all experts
            (`LayerSample.intermediate`); asked once per expert of a cluster. None aligns by weights alone.
    """
    merged = [cluster for cluster in decision.clusters if len(cluster) > 1]
    if not merged:
        return weights
    present = weights.tensors()
    aligned = {name: present[name].clone() for name in NEURON_DIM if name in present}
    for centroid, *members in merged:
        theirs_NF = None if intermediates is None else intermediates(centroid)
        for member in members:
            own_NF = None if intermediates is None else intermediates(member)
            activations = None if own_NF is None or theirs_NF is None else (own_NF, theirs_NF)
            order_F = align_neurons(weights, member, centroid, activations=activations)
            for name, tensor in aligned.items():
                tensor[member] = present[name][member].index_select(NEURON_DIM[name] - 1, order_F.to(tensor.device))
    return replace(weights, **aligned)


def _neuron_parts(weights: LayerWeights, expert: int) -> list[Float[Tensor, "F I"]]:
    """What an expert's neurons are made of, one row per neuron, fp32: gate (if any), up, down."""
    parts = []
    for weight_EFD, bias_EF in ((weights.gate_EFD, weights.gate_bias_EF), (weights.up_EFD, weights.up_bias_EF)):
        if weight_EFD is not None:
            bias = [] if bias_EF is None else [bias_EF[expert, :, None].float()]
            parts.append(torch.cat([weight_EFD[expert].float(), *bias], dim=1))
    return [*parts, weights.down_EDF[expert].float().T]


def _distance(left_FI: Float[Tensor, "F I"], right_FI: Float[Tensor, "F I"]) -> Float[Tensor, "F F"]:
    """||left_i - right_j||^2 over the mean squared norm of all rows of both; zeros where all rows are zero."""
    left_F, right_F = left_FI.square().sum(1), right_FI.square().sum(1)
    scale = ((left_F.mean() + right_F.mean()) / 2).clamp(min=torch.finfo(torch.float32).tiny)
    squared_FF = (left_F[:, None] + right_F).addmm(left_FI, right_FI.T, alpha=-2)
    return squared_FF.clamp_(min=0) / scale
