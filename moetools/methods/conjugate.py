"""Least squares over a layer's experts without its normal equations: products, block Cholesky, conjugate gradients.

A [T, N] holds the experts' gated intermediates ("features") side by side, expert e in its own W_e of the N columns, and
is zero where a token is not routed. It is never formed: A P and A^T U are sums of one product per expert, and every
array that grows with N has D columns or the width of one preconditioner block. No pair of experts is ever multiplied.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_MOST_DAMPINGS = 12
FEW_COLUMNS = 4096
"""Of so many the matrix A^T A takes 64 MiB, and summing it costs less than the products that it saves."""
Product = Callable[[Float[Tensor, "N D"]], Float[Tensor, "N D"]]


@dataclass(frozen=True, kw_only=True)
class FeatureRows:
    """Some rows of A, and what the layer should add for their tokens.

    Attributes:
        tokens: per expert, the rows [S] in which its features stand, none twice.
        features: per expert, gate times intermediate [S, W] for those tokens.
        target: the wanted output [T, D]; computed when it is asked for.
        weight_T: how much each token counts; None counts all alike.
    """

    tokens: Sequence[Tensor]
    features: Sequence[Tensor]
    target: Callable[[], Float[Tensor, "T D"]]
    num_tokens: int
    weight_T: Float[Tensor, "T"] | None = None

    def times(self, matrix_ND: Float[Tensor, "N D"]) -> Float[Tensor, "T D"]:
        """A M."""
        result_TD = matrix_ND.new_zeros(self.num_tokens, matrix_ND.shape[1])
        blocks = matrix_ND.split([part.shape[1] for part in self.features])
        for token_S, features_SW, block_WD in zip(self.tokens, self.features, blocks, strict=True):
            result_TD.index_add_(0, token_S, features_SW @ block_WD)
        return result_TD

    def add_transposed(self, values_TD: Float[Tensor, "T D"], total_ND: Float[Tensor, "N D"]) -> None:
        """total += A^T diag(weight) U."""
        weighted_TD = self.weighted(values_TD)
        blocks = total_ND.split([part.shape[1] for part in self.features])
        for token_S, features_SW, block_WD in zip(self.tokens, self.features, blocks, strict=True):
            block_WD.addmm_(features_SW.T, weighted_TD[token_S])

    def weighted(self, values_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        return values_TD if self.weight_T is None else self.weight_T[:, None] * values_TD

    def energy(self, values_TD: Float[Tensor, "T D"]) -> float:
        """sum_t weight_t ||u_t||^2."""
        squares_T = values_TD.double().square().sum(1)
        return (squares_T if self.weight_T is None else squares_T * self.weight_T).sum().item()


class FeatureProblem(ABC):
    """The rows of a layer's least-squares problem, made anew for every pass over them (or kept, or read back)."""

    widths: Sequence[int]
    """Columns of each expert."""

    @abstractmethod
    def rows(self, held_out: bool) -> Iterable[FeatureRows]:
        """The rows that are (not) held out, always in the same order."""


class GramProduct:
    """M -> A^T diag(weight) A M over some of a problem's rows.

    Of few columns the matrix is summed once and every product after it is a small one; of many there is never one, and
    a product is a pass over the rows. Which it is depends on the columns alone.

    Args:
        held_out: of these rows, or those of training.
        like: dtype and device.
    """

    def __init__(self, problem: FeatureProblem, held_out: bool, like: Tensor) -> None:
        self._problem, self._held_out = problem, held_out
        self._gram_NN = _gram(problem, held_out, like) if sum(problem.widths) <= FEW_COLUMNS else None

    @property
    def summed(self) -> bool:
        """Whether a product costs no pass over the rows."""
        return self._gram_NN is not None

    def __call__(self, matrix_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        if self._gram_NN is not None:
            return self._gram_NN @ matrix_ND
        total_ND = torch.zeros_like(matrix_ND)
        for part in self._problem.rows(self._held_out):
            part.add_transposed(part.times(matrix_ND), total_ND)
        return total_ND


def _gram(problem: FeatureProblem, held_out: bool, like: Tensor) -> Float[Tensor, "N N"]:
    """A^T diag(weight) A: each expert's features times all features of its tokens that stand right of it."""
    columns = sum(problem.widths)
    starts = [sum(problem.widths[:expert]) for expert in range(len(problem.widths))]
    gram_NN = like.new_zeros(columns, columns)
    for part in problem.rows(held_out):
        every_TN = like.new_zeros(part.num_tokens, columns)
        for start, token_S, features_SW in zip(starts, part.tokens, part.features, strict=True):
            every_TN[token_S, start : start + features_SW.shape[1]] = features_SW
        weighted_TN = part.weighted(every_TN)
        for start, token_S, features_SW in zip(starts, part.tokens, part.features, strict=True):
            gram_NN[start : start + features_SW.shape[1], start:].addmm_(features_SW.T, weighted_TN[token_S, start:])
    upper_NN = gram_NN.triu(1)
    return gram_NN.triu_().add_(upper_NN.T)


@dataclass(frozen=True, kw_only=True)
class ColumnBlock:
    """Columns of one expert that are solved together in the preconditioner: `start` counts among all N."""

    expert: int
    start: int
    inside: slice

    @property
    def width(self) -> int:
        return self.inside.stop - self.inside.start


def column_blocks(widths: Sequence[int], most: int) -> list[ColumnBlock]:
    """Every expert's columns in equal parts of at most `most`."""
    blocks: list[ColumnBlock] = []
    start = 0
    for expert, width in enumerate(widths):
        parts = -(-width // max(1, most))
        bounds = [width * part // parts for part in range(parts + 1)] if parts else [0]
        blocks += [
            ColumnBlock(expert=expert, start=start + low, inside=slice(low, high))
            for low, high in itertools.pairwise(bounds)
        ]
        start += width
    return blocks


class BlockGrams:
    """The diagonal blocks of A^T diag(weight) A, blocks of equal width together; what the preconditioner factors.

    Args:
        widths: columns of each expert.
        most: columns of a block; an expert that is wider has several.
        like: dtype and device of the sums.
    """

    def __init__(self, widths: Sequence[int], most: int, like: Tensor) -> None:
        self._blocks: dict[int, list[ColumnBlock]] = {}
        for block in column_blocks(widths, most):
            self._blocks.setdefault(block.width, []).append(block)
        self._grams = {width: like.new_zeros(len(found), width, width) for width, found in self._blocks.items()}

    @property
    def trace(self) -> float:
        """Of A^T diag(weight) A; trace / N is the unit of a ridge."""
        return sum(gram.diagonal(dim1=1, dim2=2).sum(dtype=torch.float64).item() for gram in self._grams.values())

    def add(self, part: FeatureRows) -> None:
        for width, blocks in self._blocks.items():
            for gram_WW, block in zip(self._grams[width], blocks, strict=True):
                features_SW = part.features[block.expert][:, block.inside]
                weighted_SW = features_SW
                if part.weight_T is not None:
                    weighted_SW = part.weight_T[part.tokens[block.expert], None] * features_SW
                gram_WW.addmm_(features_SW.T, weighted_SW)

    def mean_energy(self, kept_N: Bool[Tensor, "N"]) -> float:
        """Mean diagonal entry of A^T diag(weight) A over some of the columns."""
        total = sum(gram.diagonal()[kept_N[columns]].sum(dtype=torch.float64).item() for columns, gram in self._each())
        return total / max(1, int(kept_N.sum()))

    def _each(self) -> Iterator[tuple[slice, Tensor]]:
        for width, blocks in self._blocks.items():
            for gram_WW, block in zip(self._grams[width], blocks, strict=True):
                yield slice(block.start, block.start + width), gram_WW

    def inverses(self, kept_N: Bool[Tensor, "N"], damping: float) -> Iterator[tuple[Int[Tensor, "M"], Tensor]]:
        """Of every block + damping * I, restricted to some of the columns: (those, counted among all N; inverse)."""
        for columns, gram_WW in self._each():
            inside_M = kept_N[columns].nonzero().flatten()
            factor_MM = _factor(gram_WW[inside_M][:, inside_M][None], damping)[0]
            yield inside_M + columns.start, torch.cholesky_inverse(factor_MM)

    def factored(self, damping: float) -> "BlockFactors":
        """Cholesky factors of every block + damping * I."""
        starts = {width: [block.start for block in blocks] for width, blocks in self._blocks.items()}
        return BlockFactors({width: _factor(gram, damping) for width, gram in self._grams.items()}, starts)


def _factor(gram_BWW: Tensor, damping: float) -> Tensor:
    """Lower Cholesky factors; where a block is too close to singular for its dtype, with ten times the damping."""
    for _ in range(_MOST_DAMPINGS):
        damped = gram_BWW.clone()
        damped.diagonal(dim1=1, dim2=2).add_(damping)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed.any()):
            return factor
        damping *= 10
    raise AssertionError("a Gram matrix with finite entries becomes positive definite")


class BlockFactors:
    """M^-1 for M = the diagonal blocks of A^T A + damping * I."""

    def __init__(self, factors: dict[int, Tensor], starts: dict[int, list[int]]) -> None:
        self._factors, self._starts = factors, starts

    def solve(self, matrix_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        result_ND = torch.empty_like(matrix_ND)
        for width, factor_BWW in self._factors.items():
            for factor_WW, start in zip(factor_BWW, self._starts[width], strict=True):
                here = slice(start, start + width)
                result_ND[here] = torch.cholesky_solve(matrix_ND[here], factor_WW)
        return result_ND


def conjugate_gradients(
    product: Product, precondition: Product, wanted_ND: Float[Tensor, "N D"]
) -> Iterator[Float[Tensor, "N D"]]:
    """Iterates of preconditioned conjugate gradients for H X = B from X = 0, all D right-hand sides side by side.

    Each right-hand side has its own step sizes, so a product with H serves all of them and none disturbs another. The
    tensor that is yielded is the same one every time: it changes with the next step. It ends when every right-hand side
    is solved exactly.

    Args:
        product: X -> H X, H symmetric and positive definite.
        precondition: R -> M^-1 R, M close to H.

    Source: Hestenes & Stiefel 1952; block-diagonal preconditioning as in any text on Krylov methods.
    """
    solution_ND, residual_ND = torch.zeros_like(wanted_ND), wanted_ND.clone()
    direction_ND = torch.zeros_like(wanted_ND)
    before_D = wanted_ND.new_ones(wanted_ND.shape[1], dtype=torch.float64)
    while True:
        closer_ND = precondition(residual_ND)
        now_D = _inner(residual_ND, closer_ND)
        if not bool((now_D > 0).any()):
            return
        direction_ND.mul_((now_D / before_D).nan_to_num(0.0, 0.0, 0.0).to(direction_ND)).add_(closer_ND)
        curved_ND = product(direction_ND)
        step_D = (now_D / _inner(direction_ND, curved_ND)).nan_to_num(0.0, 0.0, 0.0).to(direction_ND)
        solution_ND.addcmul_(direction_ND, step_D)
        residual_ND.addcmul_(curved_ND, step_D, value=-1)
        before_D = now_D
        yield solution_ND


def solve_roughly(
    product: Product, precondition: Product, wanted_ND: Float[Tensor, "N D"], iterations: int
) -> Float[Tensor, "N D"]:
    """The last of some iterates; zeros where there is nothing to solve."""
    solution_ND = torch.zeros_like(wanted_ND)
    steps = conjugate_gradients(product, precondition, wanted_ND)
    for solution_ND in itertools.islice(steps, iterations):  # noqa: B007
        continue
    return solution_ND


def _inner(one_ND: Tensor, other_ND: Tensor) -> Float[Tensor, "D"]:
    """Column by column, in fp64."""
    pairs = zip(one_ND.split(4096), other_ND.split(4096), strict=True)
    total_D = one_ND.new_zeros(one_ND.shape[1], dtype=torch.float64)
    for one, other in pairs:
        total_D += (one * other).sum(0, dtype=torch.float64)
    return total_D
