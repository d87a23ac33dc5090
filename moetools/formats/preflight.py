"""Refuses what is known to load wrong, or not at all, before anything is computed.

What is refused was observed on stock transformers 5.17 and 5.23 with compressed-tensors 0.20 (`tests/formats` repeats
it) and read in vLLM 0.33's loader.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from moetools.architectures.base import Architecture
from moetools.checkpoint.reader import Checkpoint
from moetools.errors import UserError
from moetools.formats.base import Format, load_format
from moetools.formats.schemes import is_expert
from moetools.grids.base import Grid

Target = Literal["transformers", "vllm", "both"]
_BLOCK = 128
_EXPAND = "`moetools.quantize('PACKED', 'PLAIN', expand=True)`"
ONE_KIND = (
    "integers of any widths go together, and so does one float scheme for all: leave `attention` and `embeddings` out, "
    "or give integers to experts and attention alike"
)
_ANY_MIX = (
    "`format=moetools` `target=transformers` stores any mix; a plain checkpoint for any loader is made of that output: "
    + _EXPAND
)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    layout: Format
    grids: Mapping[str, Grid]
    source: Checkpoint
    arch: Architecture
    loaders: tuple[str, ...]

    def of_experts(self) -> dict[str, Grid]:
        return {name: grid for name, grid in self.grids.items() if self.arch.part_of(name) == "experts"}

    def of_the_rest(self) -> dict[str, Grid]:
        experts = self.of_experts()
        return {name: grid for name, grid in self.grids.items() if name not in experts}


def check(
    layout: str, grids: Mapping[str, Grid], source: Checkpoint, arch: Architecture, target: Target | str
) -> list[str]:
    """Check a plan against what `target` loads; returns sentences that the user should read.

    Args:
        layout: name of the format.
        grids: grid of every tensor that is to be packed.
        target: the loaders that must read the result.

    Raises:
        UserError: what would go wrong and where that is known from; the hint is the nearest choice that works.
    """
    if target not in ("transformers", "vllm", "both"):
        raise UserError(f"unknown target '{target}'", hint="transformers, vllm or both")
    loaders = ("transformers", "vllm") if target == "both" else (target,)
    plan = _Plan(layout=load_format(layout), grids=grids, source=source, arch=arch, loaders=loaders)
    _check_storable(plan)
    _check_shapes(plan)
    if plan.layout.stock:
        _check_matrices(plan)
        _check_experts_alike(plan)
        _check_two_schemes(plan)
    return [note for loader in loaders for note in _LOADERS[loader](plan)]


def _check_storable(plan: _Plan) -> None:
    for name, grid in plan.grids.items():
        if not plan.layout.accepts(grid):
            raise UserError(
                f"format '{plan.layout.name}' does not store {_describe(grid)} ('{name}')",
                hint=ONE_KIND,
            )


def _check_shapes(plan: _Plan) -> None:
    for name, grid in plan.grids.items():
        shape = plan.source.tensors[name].shape
        columns = shape[-1]
        if grid.kind == "float8_block" and any(size % _BLOCK for size in shape):
            raise UserError(
                f"'{name}' is {list(shape)}; blocks of {_BLOCK} x {_BLOCK} do not tile it, and transformers would load "
                "it 7-10 % wrong",
                hint="`scheme=fp8` has one scale per row and takes any shape",
            )
        if plan.layout.stock and grid.group_size and columns % grid.group_size:
            sizes = [size for size in (128, 64, 32, 16) if columns % size == 0]
            raise UserError(
                f"{_describe(grid)}: groups of {grid.group_size} do not divide the {columns} columns of '{name}'",
                hint=f"`scheme=w4a16` `group_size={sizes[0] if sizes else 0}`",
            )


def _check_matrices(plan: _Plan) -> None:
    for name in plan.grids:
        shape = plan.source.tensors[name].shape
        experts = plan.arch.part_of(name) == "experts"
        if len(shape) != 2 or not name.endswith(".weight") or (experts and not is_expert(name)):
            raise UserError(
                f"{plan.arch.model_type} keeps the weights of all experts in one tensor ('{name}' is {list(shape)}); "
                "stock formats need one matrix per expert under the original names",
                hint="`format=moetools` `target=transformers` stores it; a plain checkpoint is made of that output: "
                + _EXPAND,
            )


def _check_experts_alike(plan: _Plan) -> None:
    experts = plan.of_experts()
    if not experts:
        return
    whole = [
        name
        for name, info in plan.source.tensors.items()
        if is_expert(name)
        and plan.arch.part_of(name) == "experts"
        and len(info.shape) == 2
        and name.endswith(".weight")
        and not plan.arch.is_extra(name, plan.source.config)
        and not plan.arch.predicts_more(name, plan.source.config)
    ]
    left = [name for name in whole if name not in experts]
    kinds = _distinct(experts.values())
    if len(kinds) > 1:
        raise UserError(
            f"experts of different precision ({_describe(kinds[0])}, {_describe(kinds[1])}): stock loaders take one "
            "scheme for all experts and would load the others wrong (relative error 0.7 to 1.06) without a word",
            hint=_ANY_MIX,
        )
    if left:
        raise UserError(
            f"'{left[0]}' stays unquantized while other experts are packed: stock loaders take one scheme for all",
            hint=_ANY_MIX,
        )


def _check_two_schemes(plan: _Plan) -> None:
    rest = _distinct(plan.of_the_rest().values())
    if len(rest) > 1:
        raise UserError(
            f"{len(rest)} schemes outside the experts ({', '.join(map(_describe, rest))}): stock transformers "
            "dequantizes them all as the first",
            hint="give attention, shared experts and dense layers one scheme; " + _ANY_MIX,
        )


def _in_transformers(plan: _Plan) -> list[str]:
    grids = list(plan.grids.values())
    if plan.layout.name == "moetools":
        return [f"loads in transformers after `import moetools.hf`; a checkpoint for any loader: {_EXPAND}"]
    if any(not getattr(grid, "symmetric", True) for grid in grids):
        raise UserError(
            "asymmetric integers (zero points): stock transformers fails to load them",
            hint="leave `asymmetric` away (at 2 bits the symmetric grid is as good); `target=vllm` reads them, "
            "`format=moetools` `target=transformers` stores them",
        )
    if plan.layout.name == "int-quantized":
        raise UserError(
            "int8 weights with int8 activations: stock transformers fails to load them for experts",
            hint="`scheme=w8a16` has the same weights; `target=vllm` reads w8a8",
        )
    if plan.layout.name == "nvfp4":
        raise UserError(
            "NVFP4: stock transformers forgets the global scale and loads experts about 7000 times too large",
            hint="`scheme=mxfp4`, or `target=vllm`",
        )
    if plan.arch.num_experts(plan.source.config) and not plan.of_experts():
        raise UserError(
            "packed attention beside unquantized experts: transformers 5.23 fails to load it, 5.17 leaves the experts "
            "random",
            hint="quantize the experts too, with w8a16 for example",
        )
    notes = []
    if plan.layout.name == "float-quantized":
        notes.append(
            "transformers also rounds the activations of fp8 attention layers; "
            "CompressedTensorsConfig(dequantize=True) does not"
        )
    if plan.layout.name == "fp8":
        notes.append("transformers needs accelerate to load this")
    return [*notes, *_dtype_notes(plan)]


def _dtype_notes(plan: _Plan) -> list[str]:
    """The experts get the dtype of their scales, whatever dtype the model is loaded in."""
    short = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    for name, grid in plan.grids.items():
        scale = getattr(grid, "scale_dtype", None)
        stored = short.get(plan.source.tensors[name].dtype)
        if plan.layout.name == "pack-quantized" and scale and stored and scale != stored:
            return [f"the model is {stored}, scales are {scale}: transformers gives experts the dtype of their scales"]
    return []


def _in_vllm(plan: _Plan) -> list[str]:
    if plan.layout.name == "moetools":
        raise UserError(
            "vLLM does not read moetools' own format",
            hint="quantize with one scheme for all experts, or with `target=transformers`, and make a plain checkpoint "
            f"of that output: {_EXPAND}",
        )
    per_row = any(grid.kind == "integer" and grid.group_size is None for grid in plan.grids.values())
    if plan.layout.name == "pack-quantized" and per_row:
        return ["vLLM needs its Marlin kernels (NVIDIA GPUs) for experts with one scale per row"]
    if plan.layout.name == "nvfp4":
        return ["vLLM wants one global scale for gate and up of an expert and warns where they differ"]
    return []


_LOADERS: Mapping[str, Callable[[_Plan], list[str]]] = {"transformers": _in_transformers, "vllm": _in_vllm}


def _distinct(grids: Iterable[Grid]) -> list[Grid]:
    return list(dict.fromkeys(grids))


def _describe(grid: Grid) -> str:
    """`int4 in groups of 64`."""
    facts = grid.describe()
    name = f"int{facts['bits']}" if grid.kind == "integer" else grid.kind
    sign = "" if facts.get("symmetric", True) else " with zero points"
    return f"{name}{sign}" + (f" in groups of {grid.group_size}" if grid.group_size else " per row")
