"""Quantize one decoder layer: batches of equal matrices, in the order in which they see each other's errors."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moetools.architectures.weights import LayerWeights
from moetools.formats.base import Format
from moetools.forward.expert_tensors import ExpertTensor
from moetools.forward.stock import StockModel
from moetools.grids.base import Grid, Quantized
from moetools.grids.entropy import EntropyGrid, meet_rate
from moetools.methods.blending import blend, layer_hessian
from moetools.methods.quantize.base import Inputs, QuantizeMethod, QuantizeReport
from moetools.passes.quantize_pass import CalibratedLayer
from moetools.passes.quantize_places import Place

_HESSIANS = 5
"""Copies of an expert's Hessian while it is blended."""


@dataclass(frozen=True, kw_only=True)
class QuantizedLayer:
    """What became of a layer, or (index None) of what is outside all layers.

    Attributes:
        native: all fused tensors with the quantized ones as a loader dequantizes them.
        quantized: by name on disk; a batch of one for [O, I], a batch of E for [E, O, I].
        reports: per group of matrices ("gate and up", "down", or paths of linear layers), with the matrices' names.
    """

    index: int | None
    native: dict[str, Tensor]
    quantized: dict[str, Quantized]
    reports: dict[str, QuantizeReport]


class LayerQuantizer:
    """Quantizes layers by one method into one format.

    Args:
        grids: by name on disk.
        work_bytes: scratch memory, a third for Hessians and the rest for the solver.
    """

    def __init__(
        self,
        stock: StockModel,
        method: QuantizeMethod,
        fmt: Format,
        grids: Mapping[str, Grid],
        work_bytes: int,
    ) -> None:
        self._stock, self._method, self._format, self.grids = stock, method, fmt, grids
        self._work_bytes = work_bytes

    def quantize(self, layer: CalibratedLayer, places: Sequence[Place]) -> QuantizedLayer:
        """Quantize the places of a layer; a layer of a pass without data gives no inputs."""
        result = QuantizedLayer(index=layer.index, native={}, quantized={}, reports={})
        linears = [place for place in places if place.path is not None]
        first = [place for place in linears if place.part == "attention"]
        experts = [place.expert for place in places if place.expert is not None]
        if first:
            self._linears(layer, first, result, keep_experts=False)
        others = [place for place in linears if place not in first]
        if others or experts:
            self._linears(layer, others, result, keep_experts=bool(experts))
        if experts:
            self._experts(layer, experts, result)
        return replace(result, native=layer.native)

    def _linears(
        self, layer: CalibratedLayer, places: Sequence[Place], result: QuantizedLayer, *, keep_experts: bool
    ) -> None:
        by_path = {place.path: place for place in places if place.path is not None}
        for paths, inputs in layer.linear_inputs(list(by_path), keep_experts=keep_experts):
            for grid, group in _by_grid(paths, lambda path: self.grids[by_path[path].name]):
                weights = [layer.native[f"{path}.weight"] for path in group]
                stacked, report = self.solve(torch.cat(weights)[None], grid, inputs)
                ends = torch.tensor([len(weight) for weight in weights]).cumsum(0).tolist()
                result.reports[" ".join(group)] = report
                for path, weight, end in zip(group, weights, ends, strict=True):
                    here = stacked.rows(torch.arange(end - len(weight), end, device=stacked.codes_BOI.device))
                    result.quantized[by_path[path].name] = here
                    layer.set_linear(path, self.values(here, weight.dtype)[0])

    def _experts(self, layer: CalibratedLayer, tensors: Sequence[ExpertTensor], result: QuantizedLayer) -> None:
        weights = layer.weights
        assert weights is not None
        width, hidden = weights.up_EFD.shape[1:]
        wide_grids = self._expert_grids(tensors, down=False)
        down_grids = self._expert_grids(tensors, down=True)
        if self._method.scales_columns:
            weights = self._folded(layer, weights, down_grids)
        gates = [] if weights.gate_EFD is None else [weights.gate_EFD]
        wide, wide_report = self._per_expert(
            torch.cat([*gates, weights.up_EFD], dim=1),
            wide_grids,
            layer.wide_inputs,
            hidden,
            shared=True,
        )
        rows = [self.values(expert, weights.up_EFD.dtype)[0] for expert in wide]
        fused = torch.stack(rows)
        gate, up = (fused[:, :width], fused[:, width:]) if gates else (None, fused)
        weights = layer.refitted(replace(weights, gate_EFD=gate, up_EFD=up))

        def inner_inputs(experts: Sequence[int]) -> Inputs | None:
            return layer.inner_inputs(experts, weights)

        down, down_report = self._per_expert(weights.down_EDF, down_grids, inner_inputs, width, shared=False)
        values = [self.values(expert, weights.down_EDF.dtype)[0] for expert in down]
        layer.set_experts(replace(weights, down_EDF=torch.stack(values)))
        result.reports["gate and up" if gates else "up"] = wide_report
        result.reports["down"] = down_report
        for tensor in tensors:
            parts = down if tensor.projection == "down" else wide
            chosen = parts if tensor.expert is None else [parts[tensor.expert]]
            result.quantized[tensor.name] = Quantized.stack(
                [_rows_of(part, tensor, width, bool(gates)) for part in chosen]
            )

    def _folded(self, layer: CalibratedLayer, weights: LayerWeights, grids: Sequence[Grid]) -> LayerWeights:
        """Columns of down scaled by the method's factors, which the rows of up take back.

        Exact where the intermediate is linear in up: gated experts without biases.
        """
        if weights.gate_EFD is None or weights.up_bias_EF is not None:
            return weights
        count, width = weights.up_EFD.shape[:2]
        scale_EF = torch.ones(count, width, device=weights.up_EFD.device)
        for chunk in self._chunks(count, width):
            inputs = layer.inner_inputs(chunk, weights)
            assert inputs is not None
            for grid, group in _by_grid(chunk, lambda expert: grids[expert]):
                here = inputs.matrices([expert - chunk.start for expert in group])
                scale_EF[group] = self._method.column_scales(weights.down_EDF[group], grid, here)
        factor_EF = scale_EF.to(weights.up_EFD.dtype)
        return replace(
            weights,
            up_EFD=weights.up_EFD / factor_EF[:, :, None],
            down_EDF=weights.down_EDF * factor_EF[:, None, :],
        )

    def _expert_grids(self, tensors: Sequence[ExpertTensor], *, down: bool) -> list[Grid]:
        """The grid of each expert's gate and up, or down; gate and up share theirs."""
        here = [tensor for tensor in tensors if (tensor.projection == "down") == down]
        whole = [tensor for tensor in here if tensor.expert is None]
        if whole:
            count = self._stock.arch.num_experts(self._stock.raw_config)
            assert count is not None
            return [self.grids[whole[0].name]] * count
        found = {tensor.expert: self.grids[tensor.name] for tensor in here}
        return [found[expert] for expert in sorted(found, key=lambda expert: expert or 0)]

    def _per_expert(
        self,
        weight_EOI: Tensor,
        grids: Sequence[Grid],
        inputs_of: Callable[[Sequence[int]], Inputs | None],
        columns: int,
        *,
        shared: bool,
    ) -> tuple[list[Quantized], QuantizeReport]:
        """Each expert's matrix quantized, some experts at a time so that their Hessians fit.

        Args:
            shared: all experts see inputs of one kind, so that rare ones lean on the others' Hessian.
        """
        found: dict[int, Quantized] = {}
        parts: dict[int, tuple[QuantizeReport, int]] = {}
        for chunk in self._chunks(len(weight_EOI), columns):
            inputs = inputs_of(chunk)
            if inputs is not None:
                inputs = blend(inputs, layer_hessian(inputs) if shared else None)
            for grid, group in _by_grid(chunk, lambda expert: grids[expert]):
                here = None if inputs is None else inputs.matrices([expert - chunk.start for expert in group])
                solved, report = self.solve(weight_EOI[list(group)], grid, here)
                for place, expert in enumerate(group):
                    found[expert], parts[expert] = solved.matrix(place), (report, place)
        order = range(len(weight_EOI))
        return [found[expert] for expert in order], _gather([parts[expert] for expert in order])

    def _chunks(self, experts: int, columns: int) -> Iterator[range]:
        """Experts whose Hessians fit together."""
        at_once = max(1, self._work_bytes // 3 // (_HESSIANS * 4 * columns * columns))
        return (range(start, min(start + at_once, experts)) for start in range(0, experts, at_once))

    def solve(
        self, weight_BOI: Tensor, grid: Grid, inputs: Inputs | None, *, method: QuantizeMethod | None = None
    ) -> tuple[Quantized, QuantizeReport]:
        """Codes of some matrices, entropy-coded ones at the rate of their grid.

        Args:
            method: instead of the run's.
        """
        method = method or self._method
        if not isinstance(grid, EntropyGrid):
            return method.quantize(weight_BOI, grid, inputs, work_bytes=2 * self._work_bytes // 3)
        reports: dict[int, QuantizeReport] = {}

        def attempt(grid: EntropyGrid) -> Quantized:
            quantized, report = method.quantize(weight_BOI, grid, inputs, work_bytes=2 * self._work_bytes // 3)
            reports[id(quantized)] = report
            return quantized

        best = meet_rate(grid, attempt)
        return best, reports[id(best)]

    def values(self, quantized: Quantized, dtype: torch.dtype) -> Tensor:
        """[B, O, I], as a loader of the run's format has them."""
        return self._format.dequantize(quantized, dtype=dtype)


def scratch_of_layers(method: QuantizeMethod, places: Sequence[Place]) -> int:
    """Memory that the Hessian of the widest matrix and its solver take, one matrix at a time."""
    hessian = max((_HESSIANS * 4 * place.shape[1] ** 2 for place in places), default=0)
    solver = max((method.scratch_bytes(*place.shape) for place in places), default=0)
    return max(3 * hessian, 3 * solver // 2)


def _by_grid(items: Iterable[Any], grid_of: Callable[[Any], Grid]) -> list[tuple[Grid, list[Any]]]:
    groups: dict[Grid, list[Any]] = defaultdict(list)
    for item in items:
        groups[grid_of(item)].append(item)
    return list(groups.items())


def _rows_of(quantized: Quantized, tensor: ExpertTensor, width: int, gated: bool) -> Quantized:
    """The rows of gate stacked on up that a tensor on disk holds."""
    if tensor.projection == "down" or not gated or tensor.projection == "gate_up":
        return quantized
    both = torch.arange(2 * width, device=quantized.codes_BOI.device)
    rows = {"gate": both[:width], "up": both[width:], "interleaved": both.view(2, width).T.reshape(-1)}
    return quantized.rows(rows[tensor.projection])


def _gather(parts: Sequence[tuple[QuantizeReport, int]]) -> QuantizeReport:
    """One report of matrices that were solved in several batches."""

    def column(name: str) -> list[float]:
        return [getattr(report, name)[place] for report, place in parts if getattr(report, name)]

    names = ("weight_error", "output_error", "slots", "damping", "condition")
    fallback = [number for number, (report, place) in enumerate(parts) if place in report.fallback]
    return QuantizeReport(**{name: column(name) for name in names}, fallback=fallback)
