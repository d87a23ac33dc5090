"""Least-squares problems of one MoE layer: experts of any width, their features for routed tokens, sums over them."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moetools.architectures.weights import WideExpert
from moetools.forward.experts import RoutedCall
from moetools.forward.streaming import StreamedModel
from moetools.methods.refit import NormalEquations
from moetools.text.tokens import TokenBatch

HELD_OUT_EVERY = 7

Activate = Callable[[Tensor | None, Tensor], Tensor]
"""(gate or None, up) pre-activations -> intermediate."""


@dataclass(frozen=True, kw_only=True)
class Slots:
    """Which real tokens of a batch go to which new expert, sorted by expert."""

    hidden_TD: Float[Tensor, "T D"]
    token_S: Int[Tensor, "S"]
    weight_S: Float[Tensor, "S"]
    counts_E: Int[Tensor, "E"]


class EquationSums:
    """Normal equations, added up batch by batch; only pairs of experts that share tokens are multiplied."""

    def __init__(self, widths: Sequence[int], model: StreamedModel) -> None:
        size = sum(widths)
        self._starts = [sum(widths[:expert]) for expert in range(len(widths) + 1)]
        self._gram = torch.zeros(size, size, device=model.device)
        self._cross = torch.zeros(size, model.hidden_size, device=model.device)
        self._energy = 0.0

    def add(
        self,
        slots: Slots,
        target_TD: Tensor,
        experts: Sequence[WideExpert],
        activate: Activate,
    ) -> None:
        parts: list[tuple[Tensor, Tensor]] = []
        bounds = slots.counts_E.cumsum(0).tolist()
        for expert, (start, end) in enumerate(zip([0, *bounds[:-1]], bounds, strict=True)):
            token_S, weight_S = slots.token_S[start:end], slots.weight_S[start:end, None]
            parts.append((token_S, weight_S * intermediate(experts[expert], slots.hidden_TD[token_S], activate)))
            bias_D = experts[expert].down_bias_D
            if bias_D is not None:
                target_TD = target_TD.index_add(0, token_S, -weight_S * bias_D)
        self._energy += target_TD.double().square().sum().item()
        place_T = torch.empty(len(target_TD), dtype=torch.int64, device=target_TD.device)
        for one, (token_S, values_SW) in enumerate(parts):
            here = slice(self._starts[one], self._starts[one + 1])
            self._cross[here] += values_SW.T @ target_TD[token_S]
            place_T.fill_(-1)
            place_T[token_S] = torch.arange(len(token_S), device=token_S.device)
            for other in range(one, len(parts)):
                theirs, values = parts[other]
                shared = place_T[theirs]
                both = shared >= 0
                product = values_SW[shared[both]].T @ values[both]
                there = slice(self._starts[other], self._starts[other + 1])
                self._gram[here, there] += product
                if other != one:
                    self._gram[there, here] += product.T

    def result(self) -> NormalEquations:
        return NormalEquations(gram_NN=self._gram, cross_ND=self._cross, energy=self._energy)


class BlockedBatch:
    """One batch of a blocked refit: its routing, block inputs and current residual."""

    def __init__(self, call: RoutedCall, hidden: Tensor, wanted_TD: Tensor, batch: TokenBatch, number: int) -> None:
        self._hidden_TD, self._residual_TD = hidden.flatten(0, 1), wanted_TD
        bounds = call.counts_E.cumsum(0).tolist()
        spans = zip([0, *bounds[:-1]], bounds, strict=True)
        self._slots = [(call.token_S[start:end], call.weight_S[start:end, None]) for start, end in spans]
        nothing = torch.zeros(len(wanted_TD), dtype=torch.bool, device=wanted_TD.device)
        train, held = (chosen_rows(batch, number, chosen) for chosen in (False, True))
        self._rows = {False: nothing if train is None else train, True: nothing if held is None else held}

    def held_out_energy(self) -> float:
        return self._residual_TD[self._rows[True]].double().square().sum().item()

    def features(self, expert: int, weights: WideExpert, activate: Activate) -> Float[Tensor, "S W"]:
        token_S, weight_S1 = self._slots[expert]
        return weight_S1 * intermediate(weights, self._hidden_TD[token_S].to(weight_S1.device), activate)

    def subtract(self, expert: int, output_SD: Tensor) -> None:
        self._residual_TD.index_add_(0, self._slots[expert][0], -output_SD)

    def subtract_all(self, experts: Sequence[WideExpert], activate: Activate) -> None:
        for expert, weights in enumerate(experts):
            output_SD = self.features(expert, weights, activate) @ weights.down_DW.T
            if weights.down_bias_D is not None:
                output_SD = output_SD + self._slots[expert][1] * weights.down_bias_D
            self.subtract(expert, output_SD)

    def equations(self, expert: int, weights: WideExpert, activate: Activate, held: bool) -> NormalEquations:
        """Of this expert alone, towards the current residual, on the training or the held-out tokens."""
        token_S = self._slots[expert][0]
        chosen = self._rows[held][token_S]
        values_SW = self.features(expert, weights, activate)[chosen]
        target_SD = self._residual_TD[token_S[chosen]]
        return NormalEquations(
            gram_NN=values_SW.T @ values_SW,
            cross_ND=values_SW.T @ target_SD,
            energy=target_SD.double().square().sum().item(),
        )


class RoutedRows:
    """Which tokens of one batch go to which new expert; block inputs are read when they are needed."""

    def __init__(self, call: RoutedCall, inputs: Callable[[], Tensor], batch: TokenBatch, number: int) -> None:
        self._inputs = inputs
        self._tokens = call.token_S.split(call.counts_E.tolist())
        self._chosen = [chosen_rows(batch, number, held) for held in (False, True)]

    def _of(self, expert: int, held: bool) -> Int[Tensor, "S"]:
        token_S, mask_T = self._tokens[expert], self._chosen[held]
        return token_S[:0] if mask_T is None else token_S[mask_T[token_S]]

    def count(self, expert: int, *, held: bool) -> int:
        return len(self._of(expert, held))

    def hidden(self, expert: int, *, held: bool) -> Float[Tensor, "S D"]:
        token_S, hidden_TD = self._of(expert, held), self._inputs().flatten(0, 1)
        return hidden_TD[token_S.to(hidden_TD.device)].to(token_S.device)


@dataclass(frozen=True, kw_only=True)
class MemberTarget:
    """What a merged expert should output: sum_j shares[j] * down_j(q_j(x)), without biases."""

    members: Sequence[WideExpert]
    shares: Sequence[float]

    def equations(
        self, batches: Sequence[RoutedRows], number: int, expert: WideExpert, activate: Activate, held: bool
    ) -> NormalEquations:
        """Sums over the tokens that go to expert `number`, its intermediates ungated."""
        size, hidden = expert.width, expert.down_DW.shape[0]
        gram = torch.zeros(size, size, device=expert.down_DW.device)
        cross = torch.zeros(size, hidden, device=expert.down_DW.device)
        energy = 0.0
        for batch in batches:
            hidden_SD = batch.hidden(number, held=held)
            target_SD = torch.zeros(len(hidden_SD), hidden, device=cross.device)
            for member, share in zip(self.members, self.shares, strict=True):
                target_SD += share * (intermediate(member, hidden_SD, activate) @ member.down_DW.T)
            features_SW = intermediate(expert, hidden_SD, activate)
            gram += features_SW.T @ features_SW
            cross += features_SW.T @ target_SD
            energy += target_SD.double().square().sum().item()
        return NormalEquations(gram_NN=gram, cross_ND=cross, energy=energy)


def sum_equations(
    parts: Sequence[BlockedBatch], expert: int, weights: WideExpert, activate: Activate, held: bool
) -> NormalEquations:
    found = (part.equations(expert, weights, activate, held) for part in parts)
    return functools.reduce(NormalEquations.plus, found)


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


def chosen_rows(batch: TokenBatch, number: int, held: bool) -> Tensor | None:
    """Flat mask of the real tokens of the batch's sequences that are (not) held out; None if there are none."""
    size, length = batch.input_ids.shape
    sequence = torch.arange(size, device=batch.input_ids.device) + number * size
    chosen = (sequence % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == held
    mask = chosen[:, None].expand(size, length)
    if batch.attention_mask is not None:
        mask = mask & batch.attention_mask
    return mask.reshape(-1) if bool(mask.any()) else None


def chosen_slots(call: RoutedCall, target_TD: Tensor, rows_T: Tensor) -> tuple[Slots, Tensor]:
    """The slots of the chosen tokens, renumbered, and the chosen tokens' targets."""
    chosen = rows_T[call.token_S]
    place_T = rows_T.long().cumsum(0) - 1
    slots = Slots(
        hidden_TD=call.hidden_TD[rows_T],
        token_S=place_T[call.token_S[chosen]],
        weight_S=call.weight_S[chosen],
        counts_E=torch.bincount(call.expert_S[chosen], minlength=call.counts_E.numel()),
    )
    return slots, target_TD[rows_T]
