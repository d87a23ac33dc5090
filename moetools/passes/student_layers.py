"""How one FFN of a student is made: an initialisation, a choice of neurons, a closed-form refit, local steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moetools.architectures.weights import WideExpert, join_experts
from moetools.errors import UserError
from moetools.methods.distill.base import DenseInit, MoeView, Scaling, fit_width
from moetools.methods.joint_refit import Agreement, JointSolver, agreement
from moetools.methods.neurons import choose_neurons, explained
from moetools.passes.local_fit import LocalFit, fit_bytes_locally, fit_locally
from moetools.passes.recipe_checks import least_refit_bytes
from moetools.passes.student_streams import StudentLayer

_SELECTION_EVERY = 2
_MOST_CANDIDATES = 8192
"""Neurons that are considered together; others were the least useful alone."""
_BLOCK = 4096
_PAIR_COPIES = 2
"""Of the inputs and targets of local steps: by batch and joined."""


@dataclass(frozen=True, kw_only=True)
class FitRecipe:
    """How every layer's FFN is fitted.

    Attributes:
        init: the initialisation.
        scaling: of experts' neurons, see `MoeView.expert_scale`.
        warm_start: solve the down projection for what the layer should add (and choose among neurons of a wide start).
        local_steps: gradient steps on all three projections of a layer, towards the same target.
    """

    init: DenseInit
    scaling: Scaling = "uniform"
    warm_start: bool = True
    local_steps: int = 0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class LayerFit:
    """What was measured about one layer's FFN, on held-out tokens, before any training of the whole student.

    Y is what the FFN should add to the student's hidden states, A W what it adds.

    Attributes:
        layer: of the teacher.
        error_init, error: ||Y - A W|| / ||Y|| (Frobenius) as initialised, and in the end.
        cosine: <Y, A W> / (||Y|| ||A W||) in the end.
        ridge: chosen by the refit; None without one, or where it could not improve on the start.
        neurons: how many were chosen of how many candidates.
    """

    layer: int
    error_init: float
    error: float
    cosine: float
    ridge: float | None
    neurons: tuple[int, int]


class StudentFitter:
    """Fits one layer after the other.

    Args:
        width: neurons of every FFN.
        top_k: experts per token of the teacher.
    """

    def __init__(self, recipe: FitRecipe, *, width: int, top_k: int) -> None:
        self.recipe, self.width, self.top_k = recipe, width, top_k

    def fit(self, layer: StudentLayer, dtype: torch.dtype) -> tuple[WideExpert, LayerFit]:
        """The new FFN as it will be on disk (rounded to `dtype`, kept in fp32), and what was measured."""
        start = self._start(layer)
        candidates = start.width
        if not self.recipe.warm_start:
            ffn = _rounded(start, dtype)
            found = _held_out(layer, ffn)
            return ffn, _facts(layer, ffn, found, found.error, None, candidates)
        ffn = self._chosen(layer, start)
        del start
        error_init = _held_out(layer, ffn).error
        ffn, ridge = _refitted(layer, ffn)
        if self.recipe.local_steps:
            ffn = self._improved(layer, ffn)
        ffn = _rounded(ffn, dtype)
        return ffn, _facts(layer, ffn, _held_out(layer, ffn), error_init, ridge, candidates)

    def _start(self, layer: StudentLayer) -> WideExpert:
        generator = torch.Generator().manual_seed(self.recipe.seed * 1009 + layer.index)
        if layer.weights is None:
            assert layer.fixed is not None
            wide = self.recipe.warm_start and layer.fixed.width > self.width
            return layer.fixed if wide else fit_width(layer.fixed, self.width, generator)
        fixed = layer.fixed.width if layer.fixed is not None else 0
        assert layer.sample is not None
        view = MoeView(
            layer=layer.index,
            width=self.width - fixed,
            top_k=self.top_k,
            weights=layer.weights,
            statistics=layer.statistics,
            sample=layer.sample,
            scaling=self.recipe.scaling,
            seed=self.recipe.seed,
        )
        routed = self.recipe.init.build(view)
        return routed if layer.fixed is None else join_experts((routed, layer.fixed))

    def _chosen(self, layer: StudentLayer, start: WideExpert) -> WideExpert:
        """`width` of the start's neurons, chosen by what the best refit would lose without each."""
        if start.width <= self.width:
            return start
        most = max(self.width, _MOST_CANDIDATES)
        if start.width > most:
            start = start.only(_most_useful(layer, start, most))
        (columns,) = choose_neurons(layer.features(start, every=_SELECTION_EVERY), self.width, layer.bounds)
        return start.only(columns.to(start.up_WD.device))

    def _improved(self, layer: StudentLayer, ffn: WideExpert) -> WideExpert:
        """Local gradient steps and one more refit; kept only if the held-out error falls."""
        hidden_TD, target_TD = layer.tokens()
        fit = LocalFit(steps=self.recipe.local_steps, seed=self.recipe.seed + layer.index)
        better, _ = _refitted(layer, fit_locally(ffn, hidden_TD, target_TD, layer.activate, fit))
        return better if _held_out(layer, better).error < _held_out(layer, ffn).error else ffn


def _refitted(layer: StudentLayer, ffn: WideExpert) -> tuple[WideExpert, float | None]:
    """The FFN with its down projection solved anew, and the ridge."""
    solver = JointSolver(layer.features(ffn), ffn.down_DW.T, layer.bounds)
    refit = solver.finish(solver.search())
    return replace(ffn, down_DW=refit.down_ND.T.contiguous()), refit.search.ridge


def _held_out(layer: StudentLayer, ffn: WideExpert) -> Agreement:
    return agreement(layer.features(ffn).rows(True), ffn.down_DW.T)


def _facts(
    layer: StudentLayer, ffn: WideExpert, found: Agreement, error_init: float, ridge: float | None, candidates: int
) -> LayerFit:
    return LayerFit(
        layer=layer.index,
        error_init=error_init,
        error=found.error,
        cosine=found.cosine,
        ridge=ridge,
        neurons=(ffn.width, candidates),
    )


def fit_bytes(width: int, neurons: int, hidden_size: int, local_tokens: int) -> int:
    """Memory that a layer's fit needs at least: its least squares, or the local steps after them.

    Args:
        neurons: of the layer in all.
        local_tokens: that local steps look at; 0 without any.
    """
    refit = least_refit_bytes(min(neurons, max(width, _MOST_CANDIDATES)), hidden_size)
    if not local_tokens:
        return refit
    pairs = _PAIR_COPIES * 8 * local_tokens * hidden_size
    return max(refit, pairs + fit_bytes_locally(width, hidden_size, local_tokens))


def check_width(width: int, shared: int, experts: int, init: str) -> None:
    """Refuse a width that the FFN cannot have.

    Args:
        shared: neurons of the shared experts, which are all kept.
        experts: neurons of all routed experts together.

    Raises:
        UserError: with the bounds.
    """
    if width <= shared:
        raise UserError(f"`width={width}` leaves no neuron beside the {shared} of the shared experts")
    if init == "neurons" and width > shared + experts:
        raise UserError(
            f"`width={width}` is more than the {shared + experts} neurons a layer has",
            hint="`init=merge-concatenate` or `init=random` can be wider",
        )


def restore_fit(facts: Mapping[str, Any]) -> LayerFit:
    """From `asdict` of one, also through JSON."""
    return LayerFit(**{**facts, "neurons": tuple(facts["neurons"])})


def _most_useful(layer: StudentLayer, ffn: WideExpert, count: int) -> Tensor:
    """The neurons that alone would explain most of the target: ||a_j^T Y||^2 / ||a_j||^2, block by block."""
    scores = []
    for neurons in torch.arange(ffn.width, device=ffn.up_WD.device).split(_BLOCK):
        problem = layer.features(ffn.only(neurons), every=_SELECTION_EVERY)
        scores.append(explained(problem.rows(False), len(neurons)))
    return torch.cat(scores).topk(count).indices.sort().values


def _rounded(ffn: WideExpert, dtype: torch.dtype) -> WideExpert:
    tensors = {name: tensor for name, tensor in ffn.__dict__.items() if tensor is not None}
    return replace(ffn, **{name: tensor.to(dtype).float() for name, tensor in tensors.items()})


def kept_layers(total: int, count: int | None) -> Sequence[int]:
    """Evenly spaced layers, the first and the last among them; all of them if `count` is None.

    Raises:
        UserError: a count outside 1 .. total.
    """
    if count is None:
        return range(total)
    if not 1 <= count <= total:
        raise UserError(f"`layers={count}` is not between 1 and the teacher's {total}")
    if count == 1:
        return [0]
    return [round(number * (total - 1) / (count - 1)) for number in range(count)]
