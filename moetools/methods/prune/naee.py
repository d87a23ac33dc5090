"""NAEE: keep the subset of experts whose block output, re-routed among them, stays closest to the full block's."""

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from moetools.architectures.weights import LayerWeights
from moetools.errors import StatisticsError, UserError
from moetools.methods.base import ExpertDecision, ExpertMethod, ExpertTarget, LayerSample, LayerStatistics, Route
from moetools.methods.prune.base import keep_decision

MAX_EVALUATIONS = 2_000
"""Subsets tried exhaustively at most; beyond, beam search whose width is chosen to stay near this number."""
BEAM_WIDTH = 4
_CHUNK_BYTES = 2**27


class NaeePrune(ExpertMethod):
    """The subset C of `keep` experts that minimises ||Z - Z_C||_F on a sample of N block inputs.

    Z [N, D] is the block's routed output with all experts, Z_C with only the experts in C, the router choosing and
    weighting among them as the family does (shared experts cancel). With at most 2,000 subsets (each router group
    keeps equally many) all are tried, which gives the optimum; otherwise see `choose_subset`.

    `details["error"]` is ||Z - Z_C||_F / ||Z||_F on the sample; `details["exhaustive"]` says which search it was.

    Cost per layer: every expert on all N tokens; memory N * E^2 floats (an output error needs inner products of the E
    outputs of one token, and no more of the outputs).

    Source: NAEE (arXiv 2402.14800, section 3.2), which tries all subsets.
    """

    name = "naee"
    needs_sample = True

    def plan(self, statistics: LayerStatistics, target: ExpertTarget) -> ExpertDecision:  # noqa: ARG002
        raise UserError(
            f"layer {target.layer}: naee compares block outputs, saved statistics are not enough",
            hint="give calibration data",
        )

    def plan_with_sample(
        self,
        statistics: LayerStatistics,  # noqa: ARG002
        target: ExpertTarget,
        weights: LayerWeights,
        sample: LayerSample,
    ) -> ExpertDecision:
        where = f"layer {target.layer}"
        if {weights.num_experts, sample.logits_NE.shape[1]} != {target.num_experts}:
            raise StatisticsError(
                f"{where}: the sample is for {sample.logits_NE.shape[1]} experts, the layer has {target.num_experts}"
            )
        grams_NEE = output_grams(weights, sample)
        if not (grams_NEE.isfinite().all() and sample.logits_NE.isfinite().all()):
            raise StatisticsError(
                f"{where}: expert outputs or router logits of the sample are not finite",
                hint="the weights hold NaN or infinity, or a float16 pass overflowed: try `dtype=float32`",
            )
        search = SubsetSearch(grams_NEE, sample.logits_NE.to(grams_NEE.device), sample.route)
        kept = choose_subset(search, target.keep, target.group_members())
        details: dict[str, object] = {
            "error": search.relative_error(kept),
            "exhaustive": is_exhaustive(target),
            "tried": search.tried,
        }
        return keep_decision(kept, details)


class SubsetSearch:
    """Output errors of subsets of experts, from the per-token Grams G_nij = <f_i(x_n), f_j(x_n)>.

    With a [N, E] the weights of the full routing minus those of the routing among C (zero where not chosen),
    ||Z - Z_C||_F^2 = sum over n, i, j of a_ni a_nj G_nij; at most 2K experts of a token have a weight, and only those
    are looked up.
    """

    def __init__(self, grams_NEE: Float[Tensor, "N E E"], logits_NE: Float[Tensor, "N E"], route: Route) -> None:
        self.grams_NEE, self.logits_NE, self.route = grams_NEE, logits_NE, route
        index_NK, weight_NK = route(logits_NE, torch.arange(logits_NE.shape[1], device=logits_NE.device))
        self.index_NK, self.weight_NK = index_NK.long(), weight_NK.float()
        self.tried = 0

    def squared_error(self, kept: Sequence[int]) -> float:
        """||Z - Z_C||_F^2 for the experts `kept`, ascending."""
        self.tried += 1
        kept_C = torch.tensor(kept, device=self.logits_NE.device)
        index_NK, weight_NK = self.route(self.logits_NE[:, kept_C], kept_C)
        index_NJ = torch.cat([self.index_NK, kept_C[index_NK.long()]], 1)
        return self._energy(index_NJ, torch.cat([self.weight_NK, -weight_NK.float()], 1))

    def relative_error(self, kept: Sequence[int]) -> float:
        """||Z - Z_C||_F / ||Z||_F; 0 for a block without output."""
        whole = self._energy(self.index_NK, self.weight_NK)
        return math.sqrt(self.squared_error(kept) / whole) if whole else 0.0

    def contributions(self) -> Float[Tensor, "E"]:
        """Sum over the tokens routed to e of g_e(x)^2 ||f_e(x)||^2, fp64 on the CPU: what is lost at first sight."""
        square_NE = self.grams_NEE.diagonal(dim1=1, dim2=2)
        value_NK = self.weight_NK.square() * square_NE.gather(1, self.index_NK)
        total_E = torch.zeros(square_NE.shape[1], dtype=torch.float64, device=square_NE.device)
        return total_E.index_add_(0, self.index_NK.flatten(), value_NK.flatten().double()).cpu()

    def _energy(self, index_NJ: Tensor, weight_NJ: Tensor) -> float:
        """Sum over tokens of || sum_j weight_j f_{index_j} ||^2; an expert may stand twice."""
        token_N = torch.arange(len(index_NJ), device=index_NJ.device)[:, None, None]
        gram_NJJ = self.grams_NEE[token_N, index_NJ[:, :, None], index_NJ[:, None, :]]
        value_NJ = torch.bmm(gram_NJJ, weight_NJ.unsqueeze(2)).squeeze(2) * weight_NJ
        return max(value_NJ.sum(dtype=torch.float64).item(), 0.0)


def output_grams(weights: LayerWeights, sample: LayerSample) -> Float[Tensor, "N E E"]:
    """<f_i(x_n), f_j(x_n)> for every token and pair of experts, fp32, on the weights' device.

    Outputs are made in runs of tokens that hold at most 128 MB of them.
    """
    experts, width = weights.num_experts, weights.down_EDF.shape[1]
    step = max(1, _CHUNK_BYTES // (4 * experts * width))
    grams = []
    for start in range(0, len(sample.hidden_ND), step):
        part = sample.rows(slice(start, start + step))
        output_NED = torch.stack([part.output(weights, expert) for expert in range(experts)], 1)
        grams.append(torch.bmm(output_NED, output_NED.transpose(1, 2)))
    return torch.cat(grams)


def is_exhaustive(target: ExpertTarget) -> bool:
    """Whether all subsets of that size, equally many of each group, are few enough to try."""
    size = target.num_experts // target.num_groups
    return math.comb(size, target.keep_per_group) ** target.num_groups <= MAX_EVALUATIONS


def choose_subset(search: SubsetSearch, keep: int, groups: Sequence[Sequence[int]]) -> list[int]:
    """The `keep` experts, equally many of each group, with the least output error, ascending.

    Exhaustive where the subsets number at most `MAX_EVALUATIONS`; otherwise backward elimination by beam search: from
    all experts, remove one expert per group and round, and go on with the best few sets (four, fewer where that would
    take many more than `MAX_EVALUATIONS` tries). About (E^2 - keep^2) / 2 / groups tries per set carried along.

    Args:
        search: errors of subsets.
        groups: experts of each router group, in order; all of one size.
    """
    share = keep // len(groups)
    each = [math.comb(len(members), share) for members in groups]
    if math.prod(each) <= MAX_EVALUATIONS:
        parts = itertools.product(*(itertools.combinations(members, share) for members in groups))
        subsets = [sorted(itertools.chain(*part)) for part in parts]
        # Ties go to the subset with the lower experts, which comes first.
        return min(subsets, key=search.squared_error)
    rounds = range(share + 1, len(groups[0]) + 1)
    width = max(1, min(BEAM_WIDTH, MAX_EVALUATIONS // (sum(rounds) * len(groups))))
    contributions = search.contributions().tolist()
    beam = [tuple(expert for members in groups for expert in members)]
    for _ in rounds:
        found = {subset: None for kept in beam for subset in _smaller(kept, groups, contributions)}
        beam = sorted(found, key=search.squared_error)[:width]
    return sorted(beam[0])


def _smaller(
    kept: Sequence[int], groups: Sequence[Sequence[int]], contributions: Sequence[float]
) -> Iterator[tuple[int, ...]]:
    """Sets with one expert fewer per group: each group in turn tries all its experts, the others drop their weakest.

    Groups shrink together because group-limited routing is defined for groups of one size only.
    """
    chosen = frozenset(kept)
    inside = [[expert for expert in members if expert in chosen] for members in groups]
    weakest = [min(members, key=lambda expert: (contributions[expert], expert)) for members in inside]
    for number, members in enumerate(inside):
        for expert in members:
            dropped = {*weakest[:number], expert, *weakest[number + 1 :]}
            yield tuple(each for each in kept if each not in dropped)


METHOD = NaeePrune()
