"""How one FFN of a student is made: an initialisation, a choice of neurons, a closed-form refit, local steps."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moetools.architectures.weights import WideExpert, join_experts
from moetools.errors import UserError
from moetools.methods.distill.base import DenseInit, MoeView, Scaling, fit_width
from moetools.methods.neurons import choose_neurons
from moetools.methods.refit import NormalEquations, refit_down
from moetools.passes.local_fit import LocalFit, fit_locally
from moetools.passes.student_streams import StudentLayer

_SELECTION_EVERY = 2
_GRAM_BYTES = 24
_MOST_CANDIDATES = 16_384
_BLOCK = 4096


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
        budget: bytes for normal equations.
    """

    def __init__(self, recipe: FitRecipe, *, width: int, top_k: int, budget: int) -> None:
        self.recipe, self.width, self.top_k = recipe, width, top_k
        self._most = min(_MOST_CANDIDATES, max(width, int((budget / _GRAM_BYTES) ** 0.5)))

    def fit(self, layer: StudentLayer, dtype: torch.dtype) -> tuple[WideExpert, LayerFit]:
        """The new FFN as it will be on disk (rounded to `dtype`, kept in fp32), and what was measured."""
        start = self._start(layer)
        candidates = start.width
        if not self.recipe.warm_start:
            ffn = _rounded(start, dtype)
            held = layer.equations(ffn)[1]
            return ffn, self._facts(layer, ffn, held, _error(held, ffn), None, candidates)
        ffn = self._chosen(layer, start)
        train, held = layer.equations(ffn)
        error_init = _error(held, ffn)
        result = refit_down(train, held, ffn.down_DW.T)
        ffn = replace(ffn, down_DW=result.down_ND.T.contiguous())
        if self.recipe.local_steps:
            ffn, held = self._improve(layer, ffn, held)
        ffn = _rounded(ffn, dtype)
        return ffn, self._facts(layer, ffn, held, error_init, result.ridge, candidates)

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
        if start.width > self._most:
            start = start.only(_most_useful(layer, start, self._most))
        train, held = layer.equations(start, every=_SELECTION_EVERY)
        (columns,) = choose_neurons(train.plus(held), [start.width], self.width)
        return start.only(columns.to(start.up_WD.device))

    def _improve(
        self, layer: StudentLayer, ffn: WideExpert, held: NormalEquations
    ) -> tuple[WideExpert, NormalEquations]:
        """Local gradient steps and one more refit; kept only if the held-out error falls."""
        pairs = list(layer.inputs_and_targets(False))
        hidden_TD, target_TD = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
        fit = LocalFit(steps=self.recipe.local_steps, seed=self.recipe.seed + layer.index)
        better = fit_locally(ffn, hidden_TD, target_TD, layer.activate, fit)
        train, new_held = layer.equations(better)
        result = refit_down(train, new_held, better.down_DW.T)
        better = replace(better, down_DW=result.down_ND.T.contiguous())
        if _error(new_held, better) < _error(held, ffn):
            return better, new_held
        return ffn, held

    def _facts(
        self,
        layer: StudentLayer,
        ffn: WideExpert,
        held: NormalEquations,
        error_init: float,
        ridge: float | None,
        candidates: int,
    ) -> LayerFit:
        return LayerFit(
            layer=layer.index,
            error_init=error_init,
            error=_error(held, ffn),
            cosine=_cosine(held, ffn),
            ridge=ridge,
            neurons=(ffn.width, candidates),
        )


def check_width(width: int, shared: int, experts: int, init: str) -> None:
    """Refuse a width that the FFN cannot have.

    Args:
        shared: neurons of the shared experts, which are all kept.
        experts: neurons of all routed experts together.

    Raises:
        UserError: with the bounds.
    """
    if width <= shared:
        raise UserError(f"--width {width} leaves no neuron beside the {shared} of the shared experts")
    if init == "neurons" and width > shared + experts:
        raise UserError(
            f"--width {width} is more than the {shared + experts} neurons a layer has",
            hint="--init merge-concatenate or --init random can be wider",
        )


def _most_useful(layer: StudentLayer, ffn: WideExpert, count: int) -> Tensor:
    """The neurons that alone would explain most of the target: ||a_j^T Y||^2 / ||a_j||^2, block by block."""
    scores = []
    for neurons in torch.arange(ffn.width, device=ffn.up_WD.device).split(_BLOCK):
        train, _ = layer.equations(ffn.only(neurons), every=_SELECTION_EVERY)
        energy_N = train.gram_NN.diagonal().clamp_min(torch.finfo(torch.float32).tiny)
        scores.append(train.cross_ND.square().sum(1) / energy_N)
    return torch.cat(scores).topk(count).indices.sort().values


def _error(equations: NormalEquations, ffn: WideExpert) -> float:
    return (max(equations.error(ffn.down_DW.T), 0.0) / max(equations.energy, 1e-300)) ** 0.5


def _cosine(equations: NormalEquations, ffn: WideExpert) -> float:
    down_ND = ffn.down_DW.T.double()
    inner = (down_ND * equations.cross_ND.double()).sum().item()
    square = (down_ND * (equations.gram_NN.double() @ down_ND)).sum().item()
    return inner / max((square * equations.energy) ** 0.5, 1e-300)


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
        raise UserError(f"--layers {count} is not between 1 and the teacher's {total}")
    if count == 1:
        return [0]
    return [round(number * (total - 1) / (count - 1)) for number in range(count)]
