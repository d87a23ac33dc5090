"""Routing by larger units than a token: which tokens form a unit, and what a unit's router scores are.

Letters: B sequences, N positions, E experts, V vocabulary. A unit is a sentence or a whole sequence; `unit_BN` numbers
the units of every sequence from 0, and is -1 at padding.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moetools.errors import UserError

Level = Literal["token", "sentence", "sequence"]
Pool = Literal["mean-logits", "mean-probs", "seq-topk"]
Reach = Literal["lookahead", "running", "previous"]
Weights = Literal["unit", "token"]

_ENDS = (".", "!", "?", "\u2026", "\u3002", "\uff01", "\uff1f")
_CLOSING = "\"'\u201d\u2019\u00bb)]} "


@dataclass(frozen=True, kw_only=True)
class RoutingLevel:
    """For which unit experts are chosen, and from what.

    Attributes:
        level: "token" is the model's own routing; "sentence" and "sequence" share experts.
        pool: "mean-logits" averages the router logits of the unit's tokens, "mean-probs" their softmax (or sigmoid);
            the family's own top-k rule then runs on the pooled scores. "seq-topk" gives the unit of T tokens its T * K
            highest (token, expert) scores, so that tokens use different numbers of experts (arXiv 2511.06494).
        reach: "lookahead" pools over all tokens of the unit, also those behind the token: for evaluation, prompts and
            classification, not for generation. "running" pools up to the token itself, "previous" takes the choice of
            the sentence before (in the first sentence: "running"); both are causal.
        weights: "unit" weighs the experts by the pooled scores, the same for all tokens of the unit; "token" lets every
            token weigh the unit's experts by its own scores. "seq-topk" always uses the token's own.
    """

    level: Level = "token"
    pool: Pool = "mean-probs"
    reach: Reach = "lookahead"
    weights: Weights = "token"

    def __post_init__(self) -> None:
        kinds: tuple[tuple[str, Any], ...] = (("level", Level), ("pool", Pool), ("reach", Reach), ("weights", Weights))
        for name, kind in kinds:
            if getattr(self, name) not in get_args(kind):
                raise UserError(f"routing {name} '{getattr(self, name)}'; legal: {', '.join(get_args(kind))}")
        if self.reach == "previous" and (self.level == "sequence" or self.pool == "seq-topk"):
            raise UserError(
                "routing reach 'previous' is for sentences with a mean",
                hint="a sequence has no previous one; use reach 'running'",
            )

    @property
    def causal(self) -> bool:
        """Whether no token's experts depend on tokens behind it."""
        return self.level == "token" or self.reach != "lookahead"

    @property
    def label(self) -> str:
        """The settings in words, and whether they look ahead."""
        if self.level == "token":
            return "token (the model's own)"
        shared = "" if self.pool == "seq-topk" else f", {self.weights} weights"
        ahead = "causal" if self.causal else "LOOKS AHEAD"
        return f"{self.level} {self.pool}{shared}, {self.reach} ({ahead})"


def sentence_ends(tokenizer: Any, vocab_size: int) -> Bool[Tensor, "V"]:
    """Which token ids end a sentence.

    A token ends one if its text holds a line break, or ends in . ! ? (or their East Asian forms, or an ellipsis) once
    closing quotes, brackets and blanks behind it are taken off. An abbreviation's full stop ends a sentence as well.
    """
    known = min(vocab_size, len(tokenizer))
    ends_V = torch.zeros(vocab_size, dtype=torch.bool)
    texts = tokenizer.batch_decode([[token] for token in range(known)])
    for token, text in enumerate(texts):
        ends_V[token] = "\n" in text or text.rstrip(_CLOSING).endswith(_ENDS)
    return ends_V


@dataclass(frozen=True, kw_only=True)
class UnitState:
    """Where the last chunk of every sequence stopped.

    Attributes:
        unit_B: unit of its last real token; -1 before the first.
        ended_B: whether that token ends a sentence.
    """

    unit_B: Int[Tensor, "B"]
    ended_B: Bool[Tensor, "B"]


def sequence_units(mask_BN: Bool[Tensor, "B N"]) -> Int[Tensor, "B N"]:
    """Every sequence is one unit."""
    return mask_BN.long() - 1


def sentence_units(
    ids_BN: Int[Tensor, "B N"], mask_BN: Bool[Tensor, "B N"], ends_V: Bool[Tensor, "V"], state: UnitState | None = None
) -> tuple[Int[Tensor, "B N"], UnitState]:
    """The sentence of every token: a new one begins behind a token that ends one, unless it ends one itself.

    So "?!" and a blank line belong to the sentence before. `state` goes on where the chunk before stopped.
    """
    ends_BN = ends_V.to(ids_BN.device)[ids_BN] & mask_BN
    unit_BN = torch.full_like(ids_BN, -1)
    if state is None:
        nothing_B = torch.full_like(ids_BN[:, 0], -1)
        state = UnitState(unit_B=nothing_B, ended_B=nothing_B > 0)
    unit_B, ended_B = state.unit_B, state.ended_B
    for place in range(ids_BN.shape[1]):
        real_B = mask_BN[:, place]
        begins_B = real_B & ((unit_B < 0) | (ended_B & ~ends_BN[:, place]))
        unit_B = unit_B + begins_B
        ended_B = torch.where(real_B, ends_BN[:, place], ended_B)
        unit_BN[:, place] = torch.where(real_B, unit_B, -1)
    return unit_BN, UnitState(unit_B=unit_B, ended_B=ended_B)


@dataclass(kw_only=True)
class _Carried:
    """What a layer remembers of a sequence whose next tokens come in another chunk.

    Attributes:
        unit_B: the unit that was not finished.
        sum_BE, count_B: over its tokens so far, fp64.
        before_BE, known_B: mean of the unit before it, and whether there is one.
    """

    unit_B: Tensor
    sum_BE: Tensor
    count_B: Tensor
    before_BE: Tensor
    known_B: Tensor


class MeanPool:
    """Means of router scores over units, chunk after chunk of the same sequences."""

    def __init__(self, reach: Reach) -> None:
        self._reach = reach
        self._carried: _Carried | None = None

    def __call__(self, value_BNE: Float[Tensor, "B N E"], unit_BN: Int[Tensor, "B N"]) -> Float[Tensor, "B N E"]:
        """Each token's pooled scores, in the dtype of the values; a token of padding keeps its own."""
        carried = self._carried or _nothing(value_BNE)
        real_BN = unit_BN >= 0
        exact_BNE = value_BNE.double().masked_fill(~real_BN[:, :, None], 0)
        # Units count from the carried one; padding counts with the first and adds zeros.
        place_BN = (unit_BN - carried.unit_B[:, None]).clamp(min=0)
        units = int(place_BN.max()) + 1
        sum_BUE = exact_BNE.new_zeros(len(value_BNE), units, value_BNE.shape[2])
        sum_BUE.scatter_add_(1, place_BN[:, :, None].expand_as(exact_BNE), exact_BNE)
        count_BU = exact_BNE.new_zeros(len(value_BNE), units).scatter_add_(1, place_BN, real_BN.double())
        running_BNE = self._running(exact_BNE, real_BN, place_BN, carried)
        sum_BUE[:, 0] += carried.sum_BE
        count_BU[:, 0] += carried.count_B
        mean_BUE = sum_BUE / count_BU.clamp(min=1)[:, :, None]
        pooled_BNE = {"lookahead": lambda: _at(mean_BUE, place_BN), "running": lambda: running_BNE}.get(
            self._reach, lambda: self._previous(mean_BUE, place_BN, running_BNE, carried)
        )()
        self._carry(sum_BUE, count_BU, mean_BUE, place_BN, real_BN, carried)
        return torch.where(real_BN[:, :, None], pooled_BNE.to(value_BNE.dtype), value_BNE)

    def _running(self, exact_BNE: Tensor, real_BN: Tensor, place_BN: Tensor, carried: _Carried) -> Tensor:
        """Mean of the unit's tokens up to and including each."""
        total_BNE, number_BN = exact_BNE.cumsum(1), real_BN.double().cumsum(1)
        positions = torch.arange(place_BN.shape[1], device=place_BN.device)
        fresh_BN = torch.cat([place_BN[:, :1] > 0, place_BN[:, 1:] > place_BN[:, :-1]], 1)
        first_BN = torch.where(fresh_BN, positions, 0).cummax(1).values
        before_BNE, before_BN = total_BNE - exact_BNE, number_BN - real_BN.double()
        own_BN = place_BN == 0
        sum_BNE = total_BNE - _at(before_BNE, first_BN) + own_BN[:, :, None] * carried.sum_BE[:, None]
        count_BN = number_BN - before_BN.gather(1, first_BN) + own_BN * carried.count_B[:, None]
        return sum_BNE / count_BN.clamp(min=1)[:, :, None]

    def _previous(self, mean_BUE: Tensor, place_BN: Tensor, running_BNE: Tensor, carried: _Carried) -> Tensor:
        """Mean of the unit before; where there is none, the running one."""
        earlier_BNE = _at(mean_BUE, (place_BN - 1).clamp(min=0))
        known_BN = carried.known_B[:, None].expand_as(place_BN)
        first_BNE = torch.where(known_BN[:, :, None], carried.before_BE[:, None], running_BNE)
        return torch.where((place_BN > 0)[:, :, None], earlier_BNE, first_BNE)

    def _carry(
        self,
        sum_BUE: Tensor,
        count_BU: Tensor,
        mean_BUE: Tensor,
        place_BN: Tensor,
        real_BN: Tensor,
        carried: _Carried,
    ) -> None:
        last_B1 = place_BN.masked_fill(~real_BN, 0).amax(1, keepdim=True)
        moved_B = last_B1[:, 0] > 0
        earlier_BE = _at(mean_BUE, (last_B1 - 1).clamp(min=0))[:, 0]
        self._carried = _Carried(
            unit_B=carried.unit_B + last_B1[:, 0],
            sum_BE=_at(sum_BUE, last_B1)[:, 0],
            count_B=count_BU.gather(1, last_B1)[:, 0],
            before_BE=torch.where(moved_B[:, None], earlier_BE, carried.before_BE),
            known_B=moved_B | carried.known_B,
        )


class BudgetPool:
    """Which (token, expert) pairs a unit of T tokens uses: its T * K highest scores, chunk after chunk."""

    def __init__(self, reach: Reach, top_k: int) -> None:
        self._reach, self._top_k = reach, top_k
        self._history: tuple[Tensor, Tensor] | None = None

    def __call__(self, score_BNE: Float[Tensor, "B N E"], unit_BN: Int[Tensor, "B N"]) -> Bool[Tensor, "B N E"]:
        """The chosen pairs. Ties at the last place are all taken; padding chooses nothing."""
        if self._reach == "lookahead":
            return self._whole_units(score_BNE, unit_BN)
        past = 0 if self._history is None else self._history[1].shape[1]
        if self._history is not None:
            score_BNE = torch.cat([self._history[0], score_BNE], 1)
            unit_BN = torch.cat([self._history[1], unit_BN], 1)
        self._history = score_BNE, unit_BN
        chosen = [self._up_to(score_BNE[:, :end], unit_BN[:, :end]) for end in range(past + 1, unit_BN.shape[1] + 1)]
        return torch.stack(chosen, 1)

    def _up_to(self, score_BME: Tensor, unit_BM: Tensor) -> Tensor:
        """Choice of the last token among its unit's tokens so far, [B, E]."""
        same_BM = (unit_BM == unit_BM[:, -1:]) & (unit_BM >= 0)
        flat_BX = score_BME.masked_fill(~same_BM[:, :, None], -torch.inf).flatten(1)
        budget_B1 = (same_BM.sum(1, keepdim=True) * self._top_k).clamp(min=1)
        threshold_B1 = flat_BX.sort(1, descending=True).values.gather(1, budget_B1 - 1)
        return (score_BME[:, -1] >= threshold_B1) & same_BM[:, -1:]

    def _whole_units(self, score_BNE: Tensor, unit_BN: Tensor) -> Tensor:
        chosen_BNE = torch.zeros_like(score_BNE, dtype=torch.bool)
        for unit in range(int(unit_BN.max()) + 1):
            member_BN = unit_BN == unit
            flat_BX = score_BNE.masked_fill(~member_BN[:, :, None], -torch.inf).flatten(1)
            budget_B1 = (member_BN.sum(1, keepdim=True) * self._top_k).clamp(min=1)
            threshold_B1 = flat_BX.sort(1, descending=True).values.gather(1, budget_B1 - 1)
            chosen_BNE |= (score_BNE >= threshold_B1[:, :, None]) & member_BN[:, :, None]
        return chosen_BNE


def _at(value_BUE: Tensor, place_BN: Tensor) -> Tensor:
    """value[b, place[b, n]] for every token."""
    return value_BUE.gather(1, place_BN[:, :, None].expand(-1, -1, value_BUE.shape[2]))


def _nothing(value_BNE: Tensor) -> _Carried:
    zero_BE = torch.zeros_like(value_BNE[:, 0], dtype=torch.float64)
    zero_B = zero_BE[:, 0]
    return _Carried(
        unit_B=zero_B.long(), sum_BE=zero_BE, count_B=zero_B, before_BE=zero_BE, known_B=torch.zeros_like(zero_B) > 0
    )
