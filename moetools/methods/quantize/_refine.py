"""Descent over codes and scales after GPTQ: every step lowers tr((W - Q) H (W - Q)^T), row by row.

Weights are held transposed here ([B, I, O]), so that a column of all matrices is one contiguous slice.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moetools.grids.base import Grid, Params, Quantized

_LEAST_GAIN = 0.005


def refine(
    quantized: Quantized,
    target_BOI: Float[Tensor, "B O I"],
    hessian_BII: Float[Tensor, "B I I"],
    sweeps: int,
    block_size: int,
) -> Quantized:
    """Up to `sweeps` rounds of: best storable scale (and zero) of each group, then best code of each column.

    With r = w - q and the residual gradient p = H r, the best value of column i, all else fixed, is q_i + p_i / H_ii
    (QuantEase, arXiv 2309.01885, eq. 7), and the best scale of a group with codes u (u = code - zero inside the group,
    0 outside) is s + u^T p / u^T H u. Both are rounded to what can be stored, and taken only where the error falls.
    A matrix is left alone from the round on that lowers its error by less than half a percent.
    """
    state = _State.start(quantized, target_BOI, hessian_BII)
    active_B = torch.arange(target_BOI.shape[0], device=target_BOI.device)
    finished: list[tuple[Tensor, Quantized]] = []
    error_B = state.errors()
    for _ in range(sweeps):
        state.fit_params()
        state.sweep_codes(block_size)
        before_B, error_B = error_B, state.errors()
        going_B = before_B - error_B > _LEAST_GAIN * before_B
        if not going_B.all():
            finished.append((active_B[~going_B], state.only(~going_B).quantized()))
            state, active_B, error_B = state.only(going_B), active_B[going_B], error_B[going_B]
        if not len(active_B):
            break
    finished.append((active_B, state.quantized()))
    return _assembled(finished)


@dataclass(kw_only=True)
class _State:
    """Codes, values and residual gradient p = H (w - q) of B matrices, transposed; changed in place."""

    grid: Grid
    params: Params
    hessian_BII: Tensor
    target_BIO: Tensor
    codes_BIO: Tensor
    value_BIO: Tensor
    gradient_BIO: Tensor

    @classmethod
    def start(cls, quantized: Quantized, target_BOI: Tensor, hessian_BII: Tensor) -> "_State":
        value_BOI = quantized.dequantize()
        return cls(
            grid=quantized.grid,
            params=quantized.params.each(torch.clone),
            hessian_BII=hessian_BII,
            target_BIO=target_BOI.mT,
            codes_BIO=quantized.codes_BOI.mT.contiguous(),
            value_BIO=value_BOI.mT.contiguous(),
            gradient_BIO=hessian_BII @ (target_BOI - value_BOI).mT,
        )

    def only(self, some_B: Tensor) -> "_State":
        """The state of some of the matrices."""
        return _State(
            grid=self.grid,
            params=self.params.each(lambda one: one[some_B]),
            hessian_BII=self.hessian_BII[some_B],
            target_BIO=self.target_BIO[some_B],
            codes_BIO=self.codes_BIO[some_B],
            value_BIO=self.value_BIO[some_B],
            gradient_BIO=self.gradient_BIO[some_B],
        )

    def quantized(self) -> Quantized:
        return Quantized(grid=self.grid, codes_BOI=self.codes_BIO.mT.contiguous(), params=self.params)

    def errors(self) -> Float[Tensor, "B"]:
        """tr((W - Q) H (W - Q)^T) of each matrix."""
        return ((self.target_BIO - self.value_BIO) * self.gradient_BIO).sum((1, 2))

    @property
    def columns(self) -> int:
        return self.codes_BIO.shape[1]

    def sweep_codes(self, block_size: int) -> None:
        """One pass of coordinate descent over all columns."""
        curvature_BI = self.hessian_BII.diagonal(dim1=1, dim2=2)
        size = self.grid.group_size or self.columns
        for start in range(0, self.columns, block_size):
            end = min(start + block_size, self.columns)
            step_BCO = torch.empty_like(self.gradient_BIO[:, start:end])
            for place, column in enumerate(range(start, end)):
                params = _one_group(self.params, column // size)
                old = self.value_BIO[:, column]
                earlier_B1C = self.hessian_BII[:, column, None, start:column]
                pull = torch.baddbmm(self.gradient_BIO[:, column, None], earlier_B1C, step_BCO[:, :place], alpha=-1)
                gap = pull[:, 0] / curvature_BI[:, column, None]
                code = self.grid.encode((old + gap)[..., None], params)
                step = self.grid.decode(code, params)[..., 0] - old
                # The error falls by H_ii step (2 gap - step); more than rounding noise.
                taken = gap.sub_(step, alpha=0.5001).mul_(step) > 0
                step *= taken
                self.codes_BIO[:, column] = torch.where(taken, code[..., 0], self.codes_BIO[:, column])
                self.value_BIO[:, column] += step
                step_BCO[:, place] = step
            self.gradient_BIO.baddbmm_(self.hessian_BII[:, :, start:end], step_BCO, alpha=-1)

    def fit_params(self) -> None:
        """Best storable scale, then best zero, of one group after the other; nothing where they cannot change alone."""
        if self.grid.nearest_params(self.params, self.params) is None:
            return
        for group in range(self.params.scale_BOG.shape[2]):
            here = self._columns_of(group)
            group_S = torch.zeros(here.stop - here.start, dtype=torch.long, device=self.codes_BIO.device)
            params = _one_group(self.params, group)
            by_scale_BOS, _ = self.grid.slopes(self.codes_BIO[:, here].mT, params.columns(group_S))
            self._move(group, "scale_BOG", by_scale_BOS.mT)
            if self.params.zero_BOG is not None:
                moved = _one_group(self.params, group).columns(group_S)
                _, by_zero_BOS = self.grid.slopes(self.codes_BIO[:, here].mT, moved)
                self._move(group, "zero_BOG", by_zero_BOS.mT)

    def _move(self, group: int, name: str, slope_BSO: Tensor) -> None:
        """Change one parameter of a group, given the slope of the group's values in it."""
        here = self._columns_of(group)
        gain_BO = (slope_BSO * self.gradient_BIO[:, here]).sum(1)
        curvature_BO = (slope_BSO * (self.hessian_BII[:, here, here] @ slope_BSO)).sum(1)
        best_BO = gain_BO / curvature_BO.clamp(min=torch.finfo(torch.float32).tiny)
        params = _one_group(self.params, group)
        old_BO = getattr(params, name)[..., 0]
        wanted_BO = old_BO + torch.where(curvature_BO > 0, best_BO, 0.0)
        stored = self.grid.nearest_params(replace(params, **{name: wanted_BO[..., None]}), self.params, group)
        assert stored is not None
        step_BO = getattr(stored, name)[..., 0] - old_BO
        # The error falls by 2 step gain - step^2 curvature.
        better_BO = step_BO * (2 * gain_BO - step_BO * curvature_BO) > 0
        getattr(self.params, name)[..., group] = torch.where(better_BO, getattr(stored, name)[..., 0], old_BO)
        change_BSO = slope_BSO * torch.where(better_BO, step_BO, 0.0)[:, None, :]
        self.value_BIO[:, here] += change_BSO
        self.gradient_BIO.baddbmm_(self.hessian_BII[:, :, here], change_BSO, alpha=-1)

    def _columns_of(self, group: int) -> slice:
        size = self.grid.group_size or self.columns
        return slice(group * size, min((group + 1) * size, self.columns))


def _one_group(params: Params, group: int) -> Params:
    zero_BO1 = None if params.zero_BOG is None else params.zero_BOG[..., group, None]
    return Params(scale_BOG=params.scale_BOG[..., group, None], zero_BOG=zero_BO1)


def _assembled(parts: list[tuple[Tensor, Quantized]]) -> Quantized:
    """The parts in the order of their indices."""
    order_B = torch.cat([index for index, _ in parts]).argsort()
    whole = Quantized.stack([part for _, part in parts])
    return replace(whole, codes_BOI=whole.codes_BOI[order_B], params=whole.params.each(lambda one: one[order_B]))


def row_errors(
    quantized: Quantized, target_BOI: Float[Tensor, "B O I"], hessian_BII: Float[Tensor, "B I I"]
) -> Float[Tensor, "B O"]:
    """(w - q) H (w - q)^T of each row."""
    lost_BOI = target_BOI - quantized.dequantize()
    return ((lost_BOI @ hessian_BII) * lost_BOI).sum(2)


def select_rows(first_BO: Bool[Tensor, "B O"], yes: Quantized, no: Quantized) -> Quantized:
    """The rows of `yes` where `first_BO`, else those of `no`."""
    chosen_BO1 = first_BO[:, :, None]
    params = Params.choose(chosen_BO1, yes.params, no.params)
    codes_BOI = torch.where(chosen_BO1, yes.codes_BOI, no.codes_BOI)
    return Quantized(grid=yes.grid, codes_BOI=codes_BOI, params=params)
