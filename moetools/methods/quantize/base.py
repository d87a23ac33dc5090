"""The contract of a method that rounds weights to a grid, and what it may know about the inputs of those weights.

Letters beside those of `moetools.shapes`: B matrices of one shape (experts), I input columns, O output rows.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float, Num
from torch import Tensor

from moetools.grids.base import Grid, Quantized

WORK_BYTES = 2 * 2**30
"""Scratch memory that a method may take at a time, unless told otherwise."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What B matrices of one shape saw: sums over their inputs x, never the inputs.

    Attributes:
        hessian_BII: mean over slots of g^2 x x^T, fp32; g the routing weight (1 for layers that are not routed).
        count_B: slots routed to each matrix.
    """

    hessian_BII: Float[Tensor, "B I I"]
    count_B: Num[Tensor, "B"]

    def matrices(self, some: slice | list[int]) -> "Inputs":
        """The inputs of some of the matrices."""
        return Inputs(hessian_BII=self.hessian_BII[some], count_B=self.count_B[some])


@dataclass(frozen=True, kw_only=True)
class QuantizeReport:
    """How well B matrices were rounded; one number per matrix, JSON-able.

    Attributes:
        weight_error: ||W - Q||^2 / ||W||^2.
        output_error: tr((W - Q) H (W - Q)^T) / tr(W H W^T), H the undamped `Inputs.hessian_BII`: the share of output
            energy lost, on calibration tokens. Empty without inputs.
        slots: `Inputs.count_B`. Empty without inputs.
        damping: what was added to H, as a share of its mean diagonal. Empty if the method solves nothing.
        condition: lower bound of the condition number of the damped H, from its Cholesky factor. Empty likewise.
        fallback: matrices that were rounded to nearest because their Hessian is zero.
    """

    weight_error: list[float]
    output_error: list[float] = field(default_factory=list)
    slots: list[float] = field(default_factory=list)
    damping: list[float] = field(default_factory=list)
    condition: list[float] = field(default_factory=list)
    fallback: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Solved:
    """What a method makes of one batch: the result, and numbers of its solver per matrix."""

    quantized: Quantized
    damping: list[float] = field(default_factory=list)
    condition: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class QuantizeMethod(ABC):
    """A way to choose codes and scales. Subclasses are frozen dataclasses whose fields are the method's settings.

    `METHOD` of a plug-in file is the method with its recommended settings; `dataclasses.replace` changes them.

    Attributes:
        name: the plug-in's file name.
        needs_inputs: `quantize` refuses to work without `Inputs`.
        scales_columns: the caller should ask for factors that it folds into the layer before (`column_scales`).
    """

    name: ClassVar[str]
    needs_inputs: ClassVar[bool] = False
    scales_columns: ClassVar[bool] = False

    def quantize(
        self,
        weight_BOI: Float[Tensor, "B O I"],
        grid: Grid,
        inputs: Inputs | None = None,
        *,
        work_bytes: int = WORK_BYTES,
    ) -> tuple[Quantized, QuantizeReport]:
        """Codes and scales of B matrices of one shape, a few at a time: scratch memory stays within `work_bytes`.

        At least one matrix is taken at a time. Results do not depend on `work_bytes`. Everything is on the device of
        `weight_BOI`; the weights must be finite.

        Raises:
            UserError: groups do not divide the columns, or the grid is one that the method cannot fill.
        """
        assert inputs is not None or not self.needs_inputs, f"{self.name} needs inputs"
        batch, rows, columns = weight_BOI.shape
        step = max(1, int(work_bytes // self.scratch_bytes(rows, columns)))
        parts, solved = [], []
        for start in range(0, batch, step):
            some = slice(start, start + step)
            here = None if inputs is None else inputs.matrices(some)
            result = self.solve(weight_BOI[some].float(), grid, here)
            parts.append(result.quantized)
            solved.append(_measure(weight_BOI[some].float(), result, here))
        return Quantized.stack(parts), _join(solved)

    @abstractmethod
    def solve(self, weight_BOI: Float[Tensor, "B O I"], grid: Grid, inputs: Inputs | None) -> Solved:
        """The same for one batch in fp32."""

    def column_scales(
        self,
        weight_BOI: Float[Tensor, "B O I"],
        grid: Grid,  # noqa: ARG002
        inputs: Inputs,  # noqa: ARG002
    ) -> Float[Tensor, "B I"]:
        """Factors, powers of two, by which columns are to be multiplied before `quantize`; ones if it gains nothing."""
        return torch.ones_like(weight_BOI[:, 0], dtype=torch.float32)

    def step_importance(self, inputs: Inputs) -> Float[Tensor, "B I"]:
        """What an error in a column costs, summed over slots: for grids that price codes (`Grid.prices_codes`)."""
        importance_BI = importance_of(inputs)
        assert importance_BI is not None
        return over_slots(importance_BI, inputs)

    def scratch_bytes(self, rows: int, columns: int) -> int:
        """Memory that one matrix needs while it is worked on, beside its weights and inputs."""
        return 4 * 8 * rows * columns


def over_slots(mean_BI: Float[Tensor, "B I"], inputs: Inputs) -> Float[Tensor, "B I"]:
    """Sums of what are means over slots; a matrix that no token reached counts as if half a token had."""
    return inputs.count_B.clamp(min=0.5).to(mean_BI)[:, None] * mean_BI


def importance_of(inputs: Inputs | None) -> Float[Tensor, "B I"] | None:
    """Weight of each column's error when columns are rounded on their own: the diagonal of H; ones where it is zero."""
    if inputs is None:
        return None
    diagonal = inputs.hessian_BII.diagonal(dim1=1, dim2=2)
    return torch.where(diagonal.sum(1, keepdim=True) > 0, diagonal, 1.0)


def trace(hessian: Float[Tensor, "*B I I"]) -> Float[Tensor, "*B"]:
    """Sum of each diagonal."""
    return hessian.diagonal(dim1=-2, dim2=-1).sum(-1)


def energy(matrix_BOI: Float[Tensor, "B O I"], hessian_BII: Float[Tensor, "B I I"]) -> Float[Tensor, "B"]:
    """tr(M H M^T) of each matrix."""
    return ((matrix_BOI @ hessian_BII) * matrix_BOI).double().sum((1, 2))


def _measure(weight_BOI: Tensor, solved: Solved, inputs: Inputs | None) -> QuantizeReport:
    value = solved.quantized.dequantize()
    weight_error = _share((weight_BOI - value).square().sum((1, 2)), weight_BOI.square().sum((1, 2)))
    if inputs is None:
        return QuantizeReport(weight_error=weight_error)
    lost = energy(weight_BOI - value, inputs.hessian_BII)
    slots = inputs.count_B.double().tolist()
    return QuantizeReport(
        weight_error=weight_error,
        output_error=_share(lost, energy(weight_BOI, inputs.hessian_BII)),
        slots=slots,
        damping=solved.damping,
        condition=solved.condition,
        fallback=(trace(inputs.hessian_BII) == 0).nonzero()[:, 0].tolist(),
    )


def _share(part_B: Tensor, whole_B: Tensor) -> list[float]:
    """part / whole; 0 where both are."""
    return (part_B / whole_B.clamp(min=torch.finfo(whole_B.dtype).tiny)).tolist()


def _join(reports: list[QuantizeReport]) -> QuantizeReport:
    starts = [sum(len(report.weight_error) for report in reports[:number]) for number in range(len(reports))]
    return QuantizeReport(
        weight_error=[value for report in reports for value in report.weight_error],
        output_error=[value for report in reports for value in report.output_error],
        slots=[value for report in reports for value in report.slots],
        damping=[value for report in reports for value in report.damping],
        condition=[value for report in reports for value in report.condition],
        fallback=[start + number for start, report in zip(starts, reports, strict=True) for number in report.fallback],
    )
