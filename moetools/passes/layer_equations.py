"""Least-squares problems of one MoE layer: new down projections for what the original's hidden states ask for."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moetools.architectures.weights import LayerWeights, WideExpert, stack_experts
from moetools.methods.base import ExpertDecision
from moetools.methods.refit import NormalEquations, refit_down
from moetools.text.tokens import TokenBatch

HELD_OUT_EVERY = 7

Activate = Callable[[Tensor | None, Tensor], Tensor]
"""(gate or None, up) pre-activations -> intermediate."""


@dataclass(frozen=True, kw_only=True)
class LayerBatch:
    """Which tokens of one batch go to which new expert, and what the experts should add.

    Attributes:
        slots: per expert, its tokens [S] in ascending order and their routing weights [S, 1].
        rows: masks [T] of the real tokens that are not held out (False) and of those that are (True).
        inputs: reads the block's inputs [T, D], from wherever they are kept.
        wanted: computes the targets [T, D], fp32.
    """

    slots: Sequence[tuple[Int[Tensor, "S"], Float[Tensor, "S 1"]]]
    rows: Mapping[bool, Tensor]
    inputs: Callable[[], Tensor]
    wanted: Callable[[], Tensor]

    def tokens(self, expert: int, held: bool) -> Int[Tensor, "S"]:
        """The expert's tokens that are (not) held out."""
        token_S = self.slots[expert][0]
        return token_S[self.rows[held][token_S]]

    def hidden(self, token_S: Int[Tensor, "S"]) -> Float[Tensor, "S D"]:
        """Block inputs of some tokens, where the tokens' numbers are."""
        hidden_TD = self.inputs()
        return hidden_TD[token_S.to(hidden_TD.device)].to(token_S.device)

    def features(self, expert: int, weights: WideExpert, activate: Activate) -> Float[Tensor, "S W"]:
        """Gated intermediates of the expert's tokens."""
        token_S, weight_S1 = self.slots[expert]
        return weight_S1 * intermediate(weights, self.hidden(token_S), activate)


def sum_equations(pairs: Iterable[tuple[Tensor, Tensor]], weights: WideExpert) -> NormalEquations:
    """Normal equations of one expert's down projection, from (features [S, W], targets [S, D]) of each batch."""
    gram = weights.down_DW.new_zeros(weights.width, weights.width)
    cross = weights.down_DW.new_zeros(weights.width, weights.down_DW.shape[0])
    energy = 0.0
    for features_SW, target_SD in pairs:
        gram += features_SW.T @ features_SW
        cross += features_SW.T @ target_SD
        energy += _energy(target_SD)
    return NormalEquations(gram_NN=gram, cross_ND=cross, energy=energy)


def joint_equations(
    batches: Iterable[LayerBatch], experts: Sequence[WideExpert], activate: Activate
) -> tuple[NormalEquations, NormalEquations]:
    """Normal equations of all experts' down projections together: (train, held out).

    Down biases stay as they are and are taken from the target. Only pairs of experts that share tokens are multiplied.
    """
    size, like = sum(expert.width for expert in experts), experts[0].down_DW
    grams = {held: like.new_zeros(size, size) for held in (False, True)}
    crosses = {held: like.new_zeros(size, like.shape[0]) for held in (False, True)}
    energies = {False: 0.0, True: 0.0}
    for batch in batches:
        wanted_TD = batch.wanted()
        for held, rows_T in batch.rows.items():
            parts, target_TD = _routed_features(batch, rows_T, wanted_TD, experts, activate)
            energies[held] += _energy(target_TD[rows_T])
            _add_products(grams[held], crosses[held], parts, target_TD)
    train, held_out = (
        NormalEquations(gram_NN=grams[held], cross_ND=crosses[held], energy=energies[held]) for held in (False, True)
    )
    return train, held_out


def _routed_features(
    batch: LayerBatch, rows_T: Tensor, target_TD: Tensor, experts: Sequence[WideExpert], activate: Activate
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Per expert its tokens among `rows_T` and their gated intermediates; the targets without the down biases."""
    parts: list[tuple[Tensor, Tensor]] = []
    for expert, (token_S, weight_S1) in zip(experts, batch.slots, strict=True):
        chosen = rows_T[token_S]
        token_S, weight_S1 = token_S[chosen], weight_S1[chosen]
        parts.append((token_S, weight_S1 * intermediate(expert, batch.hidden(token_S), activate)))
        if expert.down_bias_D is not None:
            target_TD = target_TD.index_add(0, token_S, -weight_S1 * expert.down_bias_D)
    return parts, target_TD


def _add_products(gram_NN: Tensor, cross_ND: Tensor, parts: Sequence[tuple[Tensor, Tensor]], target_TD: Tensor) -> None:
    starts = [0]
    for _, values_SW in parts:
        starts.append(starts[-1] + values_SW.shape[1])
    place_T = torch.empty(len(target_TD), dtype=torch.int64, device=target_TD.device)
    for one, (token_S, values_SW) in enumerate(parts):
        here = slice(starts[one], starts[one + 1])
        cross_ND[here] += values_SW.T @ target_TD[token_S]
        place_T.fill_(-1)
        place_T[token_S] = torch.arange(len(token_S), device=token_S.device)
        for other in range(one, len(parts)):
            theirs, values = parts[other]
            shared = place_T[theirs]
            both = shared >= 0
            product = values_SW[shared[both]].T @ values[both]
            there = slice(starts[other], starts[other + 1])
            gram_NN[here, there] += product
            if other != one:
                gram_NN[there, here] += product.T


def refit_one_by_one(
    batches: Sequence[LayerBatch], experts: Sequence[WideExpert], activate: Activate, *, sweeps: int = 2
) -> tuple[list[WideExpert], dict[str, float]]:
    """Solve one expert's down projection after the other for what the others leave over (Gauss-Seidel).

    min_D ||R_e - A_e D||^2 + lambda ||D||^2 on the tokens routed to e, R the current residual of the layer; then
    R -= A_e D. Every step chooses lambda on held-out tokens and leaves an expert alone that it cannot improve. Only
    one expert's Gram [F, F] is in memory, so experts of any number fit; `sweeps` times T * K * F^2 products.

    Returns:
        The experts, and their relative squared error on held-out tokens before and after.
    """
    residuals = [batch.wanted() for batch in batches]
    energy = _held_out_energy(batches, residuals)
    for expert, weights in enumerate(experts):
        for batch, residual_TD in zip(batches, residuals, strict=True):
            token_S, weight_S1 = batch.slots[expert]
            output_SD = batch.features(expert, weights, activate) @ weights.down_DW.T
            if weights.down_bias_D is not None:
                output_SD = output_SD + weight_S1 * weights.down_bias_D
            residual_TD.index_add_(0, token_S, -output_SD)
    before = _held_out_energy(batches, residuals)
    solved = list(experts)
    for expert in [*range(len(solved))] * sweeps:
        train, held_out = (
            sum_equations(_towards(residuals, batches, expert, solved[expert], activate, held), solved[expert])
            for held in (False, True)
        )
        step = refit_down(train, held_out, torch.zeros_like(train.cross_ND)).down_ND
        solved[expert] = replace(solved[expert], down_DW=solved[expert].down_DW + step.T)
        for batch, residual_TD in zip(batches, residuals, strict=True):
            residual_TD.index_add_(
                0, batch.slots[expert][0], -(batch.features(expert, solved[expert], activate) @ step)
            )
    return solved, _relative(energy, before, _held_out_energy(batches, residuals))


def _towards(
    residuals: Sequence[Tensor],
    batches: Sequence[LayerBatch],
    expert: int,
    weights: WideExpert,
    activate: Activate,
    held: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Gated intermediates of one expert's tokens that are (not) held out, and the layer's residual there."""
    for batch, residual_TD in zip(batches, residuals, strict=True):
        token_S = batch.slots[expert][0]
        chosen = batch.rows[held][token_S]
        yield batch.features(expert, weights, activate)[chosen], residual_TD[token_S[chosen]]


def _held_out_energy(batches: Sequence[LayerBatch], residuals: Sequence[Tensor]) -> float:
    return sum(_energy(residual_TD[batch.rows[True]]) for batch, residual_TD in zip(batches, residuals, strict=True))


def refit_to_members(
    batches: Sequence[LayerBatch],
    old: LayerWeights,
    decision: ExpertDecision,
    experts: Mapping[int, WideExpert],
    activate: Activate,
) -> tuple[dict[int, WideExpert], dict[str, float]]:
    """Solve merged experts' down projections for the weighted mean of their members' outputs (MergeMoE).

    min_W sum over x of ||sum_j b_j W_Dj q_j(x) - W p(x)||^2 + lambda ||W - W0||^2 over the tokens x that are routed to
    the expert, q_j and p the (ungated) intermediates of member j and of the merged expert, W0 its down projection so
    far; lambda chosen on held-out sequences. One expert's sums, [F, F] and [F, D], are in memory at a time.

    Args:
        old: the layer the members are of.
        experts: those to solve, by number.

    Returns:
        The experts, and relative squared error on held-out tokens over all of them before and after.
    """
    solved: dict[int, WideExpert] = {}
    energy = before = after = 0.0
    for number, start in experts.items():
        pairs = zip(decision.clusters[number], decision.weights[number], strict=True)
        members = [(stack_experts(old, (member,)), share) for member, share in pairs]
        train, held_out = (
            sum_equations(_towards_members(batches, number, start, members, activate, held), start)
            for held in (False, True)
        )
        result = refit_down(train, held_out, start.down_DW.T)
        solved[number] = replace(start, down_DW=result.down_ND.T)
        energy += held_out.energy
        before += result.held_out_before * held_out.energy
        after += result.held_out_after * held_out.energy
    return solved, _relative(energy, before, after)


def _towards_members(
    batches: Sequence[LayerBatch],
    number: int,
    expert: WideExpert,
    members: Sequence[tuple[WideExpert, float]],
    activate: Activate,
    held: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Intermediates of one expert's tokens that are (not) held out, and its members' mean outputs for them."""
    for batch in batches:
        hidden_SD = batch.hidden(batch.tokens(number, held))
        target_SD = expert.down_DW.new_zeros(len(hidden_SD), expert.down_DW.shape[0])
        for member, share in members:
            target_SD += share * (intermediate(member, hidden_SD, activate) @ member.down_DW.T)
        yield intermediate(expert, hidden_SD, activate), target_SD


def _energy(target_SD: Tensor) -> float:
    return target_SD.double().square().sum().item()


def _relative(energy: float, before: float, after: float) -> dict[str, float]:
    scale = max(energy, torch.finfo(torch.float64).tiny)
    return {"held_out_before": before / scale, "held_out_after": after / scale}


def intermediate(expert: WideExpert, hidden: Tensor, activate: Activate) -> Float[Tensor, "S W"]:
    hidden = hidden.float()
    up = nn.functional.linear(hidden, expert.up_WD, expert.up_bias_W)
    gate = None
    if expert.gate_WD is not None:
        gate = nn.functional.linear(hidden, expert.gate_WD, expert.gate_bias_W)
    return activate(gate, up)


def family_activation(experts: Any) -> Activate:
    """The family's own activation, on canonical gate and up pre-activations."""

    def activate(gate: Tensor | None, up: Tensor) -> Tensor:
        if gate is None:
            return experts.act_fn(up)
        interleaved = not getattr(experts, "is_concatenated", True)
        fused = torch.stack((gate, up), -1).flatten(-2) if interleaved else torch.cat((gate, up), -1)
        return experts._apply_gate(fused)

    return activate


def chosen_rows(batch: TokenBatch, first: int, held: bool) -> Tensor:
    """Flat mask of the real tokens of the batch's sequences that are (not) held out: every seventh of the data is.

    Args:
        first: number of the batch's first sequence in the data.
    """
    size, length = batch.input_ids.shape
    sequence = torch.arange(size, device=batch.input_ids.device) + first
    chosen = (sequence % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == held
    mask = chosen[:, None].expand(size, length)
    if batch.attention_mask is not None:
        mask = mask & batch.attention_mask
    return mask.reshape(-1)


def first_sequences(batches: Sequence[TokenBatch]) -> list[int]:
    """Number of each batch's first sequence in the data."""
    return list(itertools.accumulate((len(batch.input_ids) for batch in batches[:-1]), initial=0))
