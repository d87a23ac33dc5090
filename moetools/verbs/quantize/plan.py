"""What a quantization run is asked for, and which tensor gets which grid: known before any weight is read."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from moetools.errors import UnsupportedModelError, UserError
from moetools.forward.streaming import StreamedModel
from moetools.grids.base import Grid, make_grid
from moetools.grids.entropy import EntropyGrid
from moetools.grids.integer import Integer
from moetools.grids.kquant import COLUMNS, Kquant
from moetools.passes.quantize_places import Place, with_bits
from moetools.verbs.quantize.options import DEFAULT_BITS, MIXED_BITS, QuantizeOptions

_GROUP_SIZES = (128, 64, 32, 16)
_DOWN_RATE = 1.25
"""Bits per weight of entropy-coded down projections over those of gate and up; measured (docs/benchmarks.md)."""

_SHORT, _SINGLE = 32, {2: 4, 3: 4, 4: 4, 5: 5, 6: 8}
"""Columns of GGUF's single blocks, and the bits of those that stand in for K-quants."""
_GGUF_BITS = (4, 5, 8)
"""Widths of GGUF's types of single blocks."""
_MOST_RATE = 6.0
"""Of any entropy code."""


@dataclass(frozen=True, kw_only=True)
class QuantizePlan:
    """Places and grids of one run.

    Attributes:
        places: by decoder layer; those outside the layers under None.
        grids: grid of every place; for `mixed` those that are known before importances are measured, at `bits` for
            the routed experts.
        group_size: columns per scale, 0 for rows.
        notes: sentences that the user should read.
    """

    places: Mapping[int | None, list[Place]]
    grids: Mapping[str, Grid]
    group_size: int
    notes: tuple[str, ...] = ()

    @property
    def everything(self) -> list[Place]:
        """All places, layer by layer."""
        return [place for here in self.places.values() for place in here]


def plan_places(model: StreamedModel, options: QuantizeOptions) -> dict[int | None, list[Place]]:
    """Every tensor that is quantized: routed experts, linear layers unless `experts_only`, embeddings if asked for.

    Routers and gates of shared experts, and norms, are never quantized.
    """
    found: dict[int | None, list[Place]] = {None: _embedding_places(model) if options.quantizes_embeddings else []}
    for index in range(model.num_layers):
        places = [*_expert_places(model, index)]
        if not options.experts_only:
            places += [place for place in _linear_places(model, index) if _wanted(place, options)]
        found[index] = sorted(places, key=lambda place: place.name)
    return found


def _wanted(place: Place, options: QuantizeOptions) -> bool:
    return place.part != "attention" or options.attention != "none"


def _expert_places(model: StreamedModel, index: int) -> list[Place]:
    if index not in model.stock.moe_layers:
        return []
    found = []
    for tensor in model.stock.expert_tensors(index):
        shape = model.checkpoint.tensors[tensor.name].shape[-2:]
        rows, columns = reversed(shape) if tensor.transposed else shape
        found.append(Place(name=tensor.name, layer=index, part="experts", shape=(rows, columns), expert=tensor))
    return found


def _embedding_places(model: StreamedModel) -> list[Place]:
    """Embeddings, and the head unless it is them."""
    found: dict[str, Place] = {}
    for module in (model.stock.model.get_input_embeddings(), model.stock.model.get_output_embeddings()):
        path = next((path for path, one in model.stock.model.named_modules() if one is module), None)
        shape = tuple(getattr(getattr(module, "weight", None), "shape", ()))
        if path is None or len(shape) != 2:
            continue
        for name in model.stock.stored_tensors(None, {f"{path}.weight": module.weight}):
            found.setdefault(name, Place(name=name, layer=None, part="embedding", shape=shape, path=path))
    return list(found.values())


def _linear_places(model: StreamedModel, index: int) -> list[Place]:
    layer, moe, arch = model.stock.layer(index), model.stock.moe_layers.get(index), model.arch
    skipped = moe.inside(arch.router) if moe else ""
    found = []
    for path, module in layer.named_modules():
        if not isinstance(module, nn.Linear) or (moe and (path == skipped or path.startswith(f"{skipped}."))):
            continue
        name = model.stock.disk_name(index, f"{path}.weight")
        # A gate of one row (of shared experts) costs nothing and decides much.
        if name is None or module.out_features == 1 or arch.part_of(name) == "router":
            continue
        shape = (module.out_features, module.in_features)
        found.append(Place(name=name, layer=index, part=arch.part_of(name), shape=shape, path=path))
    return found


def make_plan(model: StreamedModel, options: QuantizeOptions) -> QuantizePlan:
    """Places and grids.

    Raises:
        UserError: a group size that does not divide a row, naming the tensor.
        UnsupportedModelError: nothing to quantize.
    """
    places = plan_places(model, options)
    everything = [place for here in places.values() for place in here]
    if not everything:
        raise UnsupportedModelError("no tensor of this model can be quantized")
    group_size = options.group_size if options.group_size is not None else _common_group(everything)
    grids: dict[str, Grid] = {}
    short = _short_rows(everything, options, group_size)
    for place in everything:
        grid = short.get(place.name) or _grid_for(place, options, group_size)
        if options.scheme == "mixed" and options.format == "gguf" and place.expert is not None:
            grid = _kquant(grid, everything, options) or grid
        if isinstance(grid, EntropyGrid) and place.expert is not None:
            grid = _split_rate(grid, place, everything)
        grid.check_columns(place.shape[1], place.name)
        grids[place.name] = grid
    if options.scheme == "mixed":
        mixed_widths(options, grids)
    if options.group_size and all(grid.fixed_blocks or grid.group_size is None for grid in grids.values()):
        raise UserError(f"`group_size={options.group_size}`: nothing here has groups of a size to choose")
    notes = []
    if short:
        first = next(iter(short))
        notes = [f"{len(short)} tensors have rows that 256 does not divide, and integers in groups of 32 ('{first}')"]
    return QuantizePlan(places=places, grids=grids, group_size=group_size, notes=tuple(notes))


def _short_rows(places: list[Place], options: QuantizeOptions, group_size: int) -> dict[str, Grid]:
    """Integers for the tensors whose rows are too short for their K-quant; nothing if all are."""
    found: dict[str, Grid] = {}
    asked = 0
    for place in places:
        grid = _grid_for(place, options, group_size)
        if isinstance(grid, Kquant):
            asked += 1
            if place.shape[1] % COLUMNS and place.shape[1] % _SHORT == 0:
                found[place.name] = Integer(bits=_SINGLE[grid.bits], group_size=_SHORT)
    return found if len(found) < asked else {}


def mixed_widths(options: QuantizeOptions, grids: Mapping[str, Grid]) -> tuple[int, ...]:
    """Widths that `mixed` chooses among. In a GGUF file without K-quants two and three bits would take four.

    Raises:
        UserError: an average that they do not reach, or groups that some of them have not.
    """
    if options.format != "gguf" or any(isinstance(grid, Kquant) for grid in grids.values()):
        return MIXED_BITS
    if options.asymmetric or (options.group_size or 32) % 32:
        raise UserError(
            "GGUF: mixed integers are symmetric, in groups of a multiple of 32",
            hint="`scheme=mixed` without `asymmetric` and `group_size`",
        )
    average = options.bits or DEFAULT_BITS["mixed"]
    if average < _GGUF_BITS[0]:
        raise UserError(
            f"GGUF: `bits={average:g}`: rows that 256 does not divide have types of {_GGUF_BITS[0]} bits and more",
            hint="`bits=4.5` for example, or `format=moetools`",
        )
    return _GGUF_BITS


def _kquant(grid: Grid, places: list[Place], options: QuantizeOptions) -> Grid | None:
    """The K-quant of a mixed grid's width, where all routed experts have rows for it and nothing else was asked for."""
    columns = [place.shape[1] for place in places if place.expert is not None]
    if options.asymmetric or options.group_size is not None or any(one % COLUMNS for one in columns):
        return None
    assert isinstance(grid, Integer)
    return with_bits(Kquant(type="Q4_K"), grid.bits)


def _split_rate(grid: EntropyGrid, place: Place, places: list[Place]) -> EntropyGrid:
    """Down projections get somewhat more bits per weight than gate and up; the average stays."""
    experts = [one for one in places if one.expert is not None]
    down = sum(math.prod(one.shape) for one in experts if one.expert and one.expert.projection == "down")
    total = sum(math.prod(one.shape) for one in experts)
    base = grid.rate * total / (total + (_DOWN_RATE - 1) * down)
    assert place.expert is not None
    is_down = place.expert.projection == "down"
    return replace(grid, rate=min(_MOST_RATE, base * _DOWN_RATE) if is_down else base)


def _common_group(places: list[Place]) -> int:
    columns = {place.shape[1] for place in places}
    return next((size for size in _GROUP_SIZES if all(count % size == 0 for count in columns)), 0)


def _grid_for(place: Place, options: QuantizeOptions, group_size: int) -> Grid:
    asked = {"attention": options.attention, "embedding": options.embeddings}.get(place.part)
    if asked is not None:
        scheme, _, bits = asked.partition(":")
        return scheme_grid(scheme, group_size, asymmetric=options.asymmetric, bits=float(bits) if bits else None)
    scheme = options.scheme
    if place.part != "experts" and scheme in ("ternary", "mixed", "sub1"):
        scheme = "w4a16"
    return scheme_grid(scheme, group_size, asymmetric=options.asymmetric, bits=options.bits)


def scheme_grid(scheme: str, group_size: int, *, asymmetric: bool = False, bits: float | None = None) -> Grid:
    """The grid that a scheme's name stands for.

    Args:
        group_size: 0 for one scale per row; floating-point schemes have their own.
        bits: rate of `sub1`, or the average of `mixed`, whose grid here is the nearest single width.
    """
    group = group_size or None
    makers: dict[str, Callable[[], dict[str, Any]]] = {
        "ternary": lambda: {"kind": "integer", "bits": 2, "ternary": True, "group_size": group},
        "fp8": lambda: {"kind": "float8"},
        "fp8-block": lambda: {"kind": "float8_block"},
        "mxfp4": lambda: {"kind": "mxfp4"},
        "nvfp4": lambda: {"kind": "nvfp4"},
        "w8a8": lambda: {"kind": "integer", "bits": 8},
        "sub1": lambda: {"kind": "entropy", "rate": bits or DEFAULT_BITS["sub1"]},
    }
    if scheme in makers:
        return make_grid(makers[scheme]())
    if scheme.endswith("_k"):
        return make_grid({"kind": "kquant", "type": scheme.upper()})
    width = max(2, round(bits or DEFAULT_BITS["mixed"])) if scheme == "mixed" else int(scheme[1])
    return make_grid({"kind": "integer", "bits": width, "group_size": group, "symmetric": not asymmetric})
