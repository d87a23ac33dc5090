"""Which bits each matrix gets: least total cost within a budget, exactly."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moetools.errors import UserError


def allocate(cost_NJ: Float[Tensor, "N J"], bits_NJ: Int[Tensor, "N J"], budget: int) -> Int[Tensor, "N"]:
    """One option j per item i: min sum_i cost_ij subject to sum_i bits_ij <= budget, solved exactly.

    The multiple-choice knapsack of MC-MoE (arXiv 2410.06270, section 3.2), which there needs a commercial solver:

    1. Lagrangian bound: the least multiplier lambda whose choices d_i = argmin_j cost_ij + lambda bits_ij fit into the
       budget bounds the optimum from below; spending what is left of the budget greedily bounds it from above.
    2. Dynamic programming over changes of d, item by item, those first that change at the least reduced cost (cost +
       lambda bits above that of d_i). States are (bits, cost); dropped are those that another one dominates and those
       whose reduced costs exceed the gap between the bounds, which shrinks as better solutions are found.
    3. It ends when no item left can change within the gap: usually after a few of them.

    Costs are usually the error in the layer's output with only matrix i at option j. Deterministic.

    Raises:
        UserError: even the smallest options do not fit into the budget.
    """
    cost = cost_NJ.detach().cpu().double().numpy()
    bits = bits_NJ.detach().cpu().long().numpy()
    assert np.isfinite(cost).all(), "costs must be finite"
    least = int(bits.min(1).sum())
    if least > budget:
        raise UserError(
            f"a budget of {budget} bits is too small; the smallest options together take {least} bits",
            hint=f"raise the budget to at least {least} bits, or allow options with fewer bits",
        )
    # No choice uses more than the last whole step above the least.
    step = int(np.gcd.reduce((bits - bits.min(1, keepdims=True)).ravel()))
    budget = least if not step else least + (budget - least) // step * step
    multiplier, start = _multiplier(cost, bits, budget)
    if not multiplier:
        return torch.from_numpy(start)
    search = _Search(cost, bits, budget, multiplier, start)
    search.run()
    return torch.from_numpy(search.choice())


def _cheapest(cost: np.ndarray, bits: np.ndarray, multiplier: float) -> np.ndarray:
    """argmin_j of the priced cost, ties to fewer bits."""
    priced = cost + multiplier * bits
    tied = priced <= priced.min(1, keepdims=True)
    return np.where(tied, bits, np.iinfo(np.int64).max).argmin(1)


def _multiplier(cost: np.ndarray, bits: np.ndarray, budget: int) -> tuple[float, np.ndarray]:
    """The least multiplier, found by bisection, at which the cheapest options fit, and these options."""

    def used(multiplier: float) -> int:
        return int(_at(bits, _cheapest(cost, bits, multiplier)).sum())

    if used(0.0) <= budget:
        return 0.0, _cheapest(cost, bits, 0.0)
    low, high = 0.0, 2 * float(cost.max() - cost.min())  # the latter prices one bit above any saving
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if used(middle) <= budget else (middle, high)
        if high - low <= 1e-14 * high:
            break
    return high, _cheapest(cost, bits, high)


def _fill(cost: np.ndarray, bits: np.ndarray, budget: int, choice: np.ndarray) -> np.ndarray:
    """Spend what is left of the budget: the best saving per bit first, each item at most once."""
    more = bits - _at(bits, choice)[:, None]
    saved = _at(cost, choice)[:, None] - cost
    worth = np.where((more > 0) & (saved > 0), saved / np.maximum(more, 1), -np.inf)
    best = worth.argmax(1)
    left = budget - int(_at(bits, choice).sum())
    result = choice.copy()
    for item in np.argsort(-_at(worth, best), kind="stable"):
        if worth[item, best[item]] > 0 and more[item, best[item]] <= left:
            left -= int(more[item, best[item]])
            result[item] = best[item]
    return result


def _at(table_NJ: np.ndarray, choice_N: np.ndarray) -> np.ndarray:
    return np.take_along_axis(table_NJ, choice_N[:, None], 1)[:, 0]


@dataclass(frozen=True, kw_only=True)
class _States:
    """Changes of the start for the items so far, none dominated: bits, cost and reduced cost beyond the start's."""

    bits: np.ndarray
    cost: np.ndarray
    reduced: np.ndarray


class _Search:
    """Dynamic programming over changes of the Lagrangian choice, with the bounds of `allocate`."""

    def __init__(self, cost: np.ndarray, bits: np.ndarray, budget: int, multiplier: float, start: np.ndarray) -> None:
        self.start = start
        self.best = _fill(cost, bits, budget, start)
        self.more_cost = cost - _at(cost, start)[:, None]
        self.more_bits = bits - _at(bits, start)[:, None]
        self.reduced = np.maximum(self.more_cost + multiplier * self.more_bits, 0.0)
        self.room = budget - int(_at(bits, start).sum())
        self.least = -multiplier * self.room  # bound of the cost beyond the start's
        self.upper = float(_at(self.more_cost, self.best).sum())
        self.noise = 1e-12 * float(np.abs(_at(cost, start)).sum())
        self.trail: list[tuple[int, np.ndarray, np.ndarray]] = []
        self.found: tuple[int, int] | None = None

    @property
    def gap(self) -> float:
        return self.upper - self.least + self.noise

    def run(self) -> None:
        """Items in the order of their cheapest change, until none is within the gap."""
        changed = self.reduced.copy()
        np.put_along_axis(changed, self.start[:, None], np.inf, 1)
        cheapest = changed.min(1)
        states = _States(bits=np.zeros(1, np.int64), cost=np.zeros(1), reduced=np.zeros(1))
        for item in np.argsort(cheapest, kind="stable").tolist():
            if self.upper - self.least <= self.noise or cheapest[item] > self.gap:
                break
            states = self._extend(states, item)
            fits = np.flatnonzero(states.bits <= self.room)
            if len(fits):
                place = int(fits[states.cost[fits].argmin()])
                if states.cost[place] < self.upper - self.noise:
                    self.upper, self.found = float(states.cost[place]), (len(self.trail), place)

    def _extend(self, states: _States, item: int) -> _States:
        options = np.flatnonzero(self.reduced[item] <= self.gap)
        bits = (states.bits[:, None] + self.more_bits[item, options]).ravel()
        cost = (states.cost[:, None] + self.more_cost[item, options]).ravel()
        reduced = (states.reduced[:, None] + self.reduced[item, options]).ravel()
        possible = np.flatnonzero(reduced <= self.gap)
        order = possible[np.lexsort((possible, cost[possible], bits[possible]))]
        ahead = np.minimum.accumulate(np.concatenate(([np.inf], cost[order][:-1])))
        kept = order[cost[order] < ahead]
        self.trail.append((item, kept // len(options), options[kept % len(options)]))
        return _States(bits=bits[kept], cost=cost[kept], reduced=reduced[kept])

    def choice(self) -> np.ndarray:
        """The best choice found."""
        if self.found is None:
            return self.best
        result = self.start.copy()
        steps, place = self.found
        for item, parent, option in reversed(self.trail[:steps]):
            result[item] = option[place]
            place = int(parent[place])
        return result
