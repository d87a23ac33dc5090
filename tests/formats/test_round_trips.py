"""Packed and unpacked again: every layout, width and odd shape gives back the same codes, scales and zeros."""

import json

import numpy as np
import pytest
import torch
from packing import among, write_packed
from safetensors.torch import load_file, save_file
from torch import Tensor

from moetools.checkpoint.reader import open_checkpoint
from moetools.errors import CheckpointError, UserError
from moetools.formats.base import Packed, default_format, find_layout, formats, load_format
from moetools.formats.layouts.moetools import Own
from moetools.formats.payloads import integer as stream
from moetools.formats.payloads import kquant, mxfp4
from moetools.formats.reader import PackedCheckpoint, open_model
from moetools.grids.base import Grid, Quantized, make_grid

KQUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
SHAPES = ((1, 1), (3, 5), (7, 33), (24, 40))
NAME = "model.layers.0.mlp.experts.0.up_proj.weight"


def integer(bits: int, group: int | None = None, **options: object) -> Grid:
    return make_grid({"kind": "integer", "bits": bits, "group_size": group, **options})


def random_matrix(grid: Grid, shape: tuple[int, int], seed: int = 0) -> Quantized:
    """Every code occurs; scales of both signs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, *shape, generator=generator)
    quantized = grid.quantize(weight)
    lowest, highest = getattr(grid, "lowest", 0), getattr(grid, "highest", 15 * (grid.kind == "mxfp4"))
    codes = torch.randint(lowest, highest + 1, (1, *shape), generator=generator).to(quantized.codes_BOI.dtype)
    return Quantized(grid=grid, codes_BOI=codes, params=quantized.params)


def assert_equal(found: Quantized, meant: Quantized) -> None:
    assert torch.equal(found.codes_BOI, meant.codes_BOI)
    assert found.codes_BOI.dtype == meant.codes_BOI.dtype
    assert torch.equal(found.params.scale_BOG, meant.params.scale_BOG)
    assert (found.params.zero_BOG is None) == (meant.params.zero_BOG is None)
    if meant.params.zero_BOG is not None:
        assert torch.equal(found.params.zero_BOG, meant.params.zero_BOG)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_come_back(bits: int, symmetric: bool, shape: tuple[int, int]) -> None:
    grid = integer(bits, symmetric=symmetric)
    quantized = random_matrix(grid, shape)
    layout = load_format("pack-quantized")
    parts = {"packed": f"{NAME}_packed", "scale": f"{NAME}_scale", "zero_point": f"{NAME}_zero_point"}
    packed = Packed(name=NAME, shape=shape, dtype="BF16", parts=parts, grid=grid)
    assert_equal(layout.unpack(packed, layout.pack(NAME, quantized)), quantized)
    assert_equal(stream.unpack(NAME, stream.pack(NAME, quantized)), quantized)


@pytest.mark.parametrize("options", [{"ternary": True}, {"symmetric": False, "float_zero": True}])
@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", [(5, 12), (3, 64)])
def test_own_streams_keep_ternary_codes_and_float_zeros(
    options: dict, scale_dtype: str, shape: tuple[int, int]
) -> None:
    grid = integer(2, 4, scale_dtype=scale_dtype, **options)
    quantized = random_matrix(grid, shape)
    assert_equal(stream.unpack(NAME, stream.pack(NAME, quantized)), quantized)


@pytest.mark.parametrize("layout", [one for one in formats() if one.name != "fp8"], ids=lambda one: one.name)
@pytest.mark.parametrize("shape", [(7, 64), (24, 96), (33, 128), (5, 512)])
def test_the_bytes_of_a_matrix_are_known_before_it_is_packed(layout, shape: tuple[int, int]) -> None:
    signs = [{"symmetric": True}, {"symmetric": False}, {"scale_dtype": "float32"}]
    grids = [integer(bits, group, **sign) for bits in range(2, 9) for group in (None, 32) for sign in signs]
    grids += [integer(2, 32, ternary=True), integer(4, 32, symmetric=False, float_zero=True)]
    grids += [make_grid({"kind": kind}) for kind in ("float8", "mxfp4", "nvfp4")]
    grids += [make_grid({"kind": "kquant", "type": kind}) for kind in KQUANTS if not shape[1] % 256]
    stored = [grid for grid in grids if layout.accepts(grid)]
    assert stored
    for grid in stored:
        parts = layout.pack(NAME, random_matrix(grid, shape))
        assert layout.stored_bytes(grid, *shape) == sum(part.nbytes for part in parts.values()), grid


def streams() -> list:
    found = [(kquant, make_grid({"kind": "kquant", "type": kind})) for kind in KQUANTS]
    return [*found, (mxfp4, make_grid({"kind": "mxfp4"}))]


@pytest.mark.parametrize(("payload", "grid"), streams(), ids=[*KQUANTS, "mxfp4"])
def test_streams_of_other_grids_come_back_or_are_refused(payload, grid: Grid) -> None:
    quantized = random_matrix(grid, (5, 512))
    ((name, packed),) = payload.pack(NAME, quantized).items()
    found = payload.unpack(NAME, {name: packed})
    assert found.grid == grid
    assert_equal(found, quantized)
    for kind in ("unit_BOS", "zero_unit_BOS"):
        unit, meant = getattr(found.params, kind), getattr(quantized.params, kind)
        assert (unit is None and meant is None) or torch.equal(unit, meant)
    assert payload.shape(NAME, {name: packed}) == (5, 512)
    for place in (0, 4, 9, 21, packed.numel() // 2, packed.numel() - 1):
        broken = packed.clone()
        broken[place] ^= 4
        with pytest.raises(CheckpointError, match=r"up_proj.weight' is corrupt"):
            payload.unpack(NAME, {name: broken})
    with pytest.raises(CheckpointError, match="corrupt"):
        payload.unpack(NAME, {name: packed[:-3]})


@pytest.mark.parametrize("bits", range(2, 9))
def test_own_streams_have_no_padding(bits: int) -> None:
    rows, columns = 11, 24
    (packed,) = stream.pack(NAME, random_matrix(integer(bits, 8), (rows, columns))).values()
    assert packed.numel() == 24 + rows * 3 * 2 + -(-rows * columns * bits // 8)


def test_ternary_codes_take_eight_fifths_of_a_bit() -> None:
    (packed,) = stream.pack(NAME, random_matrix(integer(2, 50, ternary=True), (20, 50))).values()
    assert packed.numel() == 24 + 20 * 2 + 20 * 50 // 5


@pytest.mark.parametrize("bits", [2, 3, 7])
def test_bits_lie_least_significant_first(bits: int) -> None:
    """Against one long Python integer."""
    quantized = random_matrix(integer(bits, symmetric=False), (3, 21))
    (packed,) = stream.pack(NAME, quantized).values()
    codes = quantized.codes_BOI.flatten().tolist()
    number = sum(code << (bits * place) for place, code in enumerate(codes))
    expected = number.to_bytes(-(-len(codes) * bits // 8), "little")
    assert packed.numpy().tobytes().endswith(expected)


def test_constant_and_zero_rows_come_back() -> None:
    weight = torch.zeros(1, 4, 16)
    weight[:, 1] = 3.5
    weight[:, 2] = -1e-30
    for options in ({}, {"symmetric": False}):
        quantized = integer(3, 8, **options).quantize(weight)
        assert_equal(stream.unpack(NAME, stream.pack(NAME, quantized)), quantized)


@pytest.mark.parametrize("ternary", [True, False])
def test_every_flipped_bit_is_noticed(ternary: bool) -> None:
    (packed,) = stream.pack(NAME, random_matrix(integer(2, 8, ternary=ternary), (4, 8))).values()
    for place in range(packed.numel()):
        for bit in range(8):
            broken = packed.clone()
            broken[place] ^= 1 << bit
            with pytest.raises(CheckpointError, match=r"up_proj.weight' is corrupt"):
                stream.unpack_stream(NAME, broken)


@pytest.mark.parametrize("cut", [1, 5, 30, 10_000])
def test_a_cut_stream_is_noticed_even_without_its_checksum(cut: int) -> None:
    (packed,) = stream.pack(NAME, random_matrix(integer(4, 8), (4, 16))).values()
    with pytest.raises(CheckpointError, match="corrupt"):
        stream.unpack_stream(NAME, packed[:-cut], check=False)
    with pytest.raises(CheckpointError, match="1 bytes too many"):
        stream.unpack_stream(NAME, torch.cat([packed, packed[:1]]), check=False)


def test_an_impossible_header_is_refused() -> None:
    (packed,) = stream.pack(NAME, random_matrix(integer(4, 8), (4, 16))).values()
    for place, value in ((4, 9), (5, 1), (6, 99), (7, 3), (16, 7)):
        broken = packed.clone()
        broken[place] = value
        with pytest.raises(CheckpointError, match="corrupt"):
            stream.unpack_stream(NAME, broken, check=False)


def own_matrix(layout_name: str) -> tuple[Grid, tuple[int, int]]:
    kinds = {
        "float-quantized": ({"kind": "float8"}, (5, 12)),
        "fp8": ({"kind": "float8_block"}, (128, 256)),
        "mxfp4": ({"kind": "mxfp4"}, (3, 64)),
        "nvfp4": ({"kind": "nvfp4"}, (3, 48)),
        "int-quantized": ({"kind": "integer", "bits": 8}, (5, 12)),
        "pack-quantized": ({"kind": "integer", "bits": 4, "group_size": 4}, (5, 12)),
        "moetools": ({"kind": "integer", "bits": 3, "group_size": 4, "symmetric": False}, (5, 12)),
    }
    description, shape = kinds[layout_name]
    return make_grid(description), shape


@pytest.mark.parametrize("name", [one.name for one in formats()])
def test_contract_of_every_format(name: str, tmp_path, rewrite) -> None:
    """Written beside plain tensors, found again by config.json and headers, and read exactly."""
    layout = load_format(name)
    grid, shape = own_matrix(name)
    weight = torch.randn(1, *shape) * 0.02
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 1, "dtype": "bfloat16"}
    source = tmp_path / "source"
    source.mkdir()
    write_plain(source, {NAME: weight[0].bfloat16(), "model.norm.weight": torch.ones(4)}, config)
    out, intended = write_packed(source, tmp_path / "out", layout, among((".experts.",), grid))
    view = open_model(out)
    assert isinstance(view, PackedCheckpoint)
    assert find_layout(view.quantization).name == name == view.format_name
    assert list(view.tensors) == list(open_checkpoint(source).tensors)
    found = view.read(view.tensors)
    assert all(torch.equal(found[key], intended[key]) and found[key].dtype == intended[key].dtype for key in intended)
    assert_equal(view.quantized(NAME), grid.quantize(weight.bfloat16().float()))
    assert view.quantized(NAME).grid == grid
    assert view.total_bytes == open_checkpoint(out).total_bytes
    lazy = view.slices([NAME])[NAME]
    assert (lazy.get_shape(), lazy.get_dtype()) == (list(shape), "BF16")
    assert torch.equal(lazy[...], intended[NAME])
    other = make_grid(unstorable(name)).quantize(torch.randn(1, 2, 64))
    with pytest.raises(ValueError, match="cannot store"):
        layout.pack(NAME, other)


def unstorable(name: str) -> dict:
    return {"kind": "nvfp4"} if name in ("mxfp4", "moetools") else {"kind": "mxfp4"}


def write_plain(folder, tensors: dict[str, Tensor], config: dict) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["pack-quantized", "int-quantized", "float-quantized", "fp8", "mxfp4", "nvfp4"])
def test_scales_that_are_not_finite_are_refused(name: str, tmp_path) -> None:
    grid, shape = own_matrix(name)
    source = tmp_path / "source"
    source.mkdir()
    write_plain(source, {NAME: torch.randn(shape).bfloat16()}, {"model_type": "qwen3_moe"})
    out, _ = write_packed(source, tmp_path / "out", load_format(name), among((".experts.",), grid))
    tensors = load_file(out / "model.safetensors")
    scale = tensors[next(key for key in tensors if "_scale" in key and "global" not in key)]
    # 255 is no exponent in E8M0, 127 no number in E4M3.
    scale.view(-1)[0] = 255 if name == "mxfp4" else float("nan")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj.weight' is corrupt: a scale is not finite"):
        open_model(out).read([NAME])


@pytest.mark.parametrize("transposed", [False, True])
def test_three_dimensions_in_our_own_format(transposed: bool, tmp_path) -> None:
    layout, grid, name = Own(), integer(3, 4), "model.layers.0.block_sparse_moe.input_linear.weight"
    weight_BOI = torch.randn(3, 5, 8)
    quantized = grid.quantize(weight_BOI)
    dense = layout.dequantize(quantized, torch.bfloat16)
    on_disk = dense.transpose(1, 2).contiguous() if transposed else dense
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    write_plain(source, {name: on_disk}, {"model_type": "granitemoe"})
    config = {"quantization_config": layout.config({name: grid}, open_checkpoint(source))}
    write_plain(out, layout.pack(name, quantized, transposed=transposed), config)
    assert torch.equal(open_model(out).read([name])[name], on_disk)


def test_defaults_prefer_what_most_loaders_read() -> None:
    kinds = {
        "pack-quantized": {"kind": "integer", "bits": 8},
        "float-quantized": {"kind": "float8"},
        "fp8": {"kind": "float8_block"},
        "mxfp4": {"kind": "mxfp4"},
        "nvfp4": {"kind": "nvfp4"},
        "moetools": {"kind": "integer", "bits": 3, "symmetric": False, "float_zero": True},
    }
    assert {name: default_format(make_grid(grid)).name for name, grid in kinds.items()} == {
        name: name for name in kinds
    }


def test_unknown_formats_are_named() -> None:
    with pytest.raises(UserError, match="unknown format 'pack-quantised'") as caught:
        load_format("pack-quantised")
    assert "pack-quantized" in caught.value.hint
    with pytest.raises(CheckpointError, match="quant_method 'quip'"):
        find_layout({"quant_method": "quip", "bits": 4})


def test_words_are_those_of_compressed_tensors() -> None:
    """Each row apart, against shifting bits into one number."""
    quantized = random_matrix(integer(3), (2, 21))
    words = load_format("pack-quantized").pack(NAME, quantized)[f"{NAME}_packed"]
    for row in range(2):
        number = sum((int(code) + 4) << (3 * place) for place, code in enumerate(quantized.codes_BOI[0, row]))
        assert words[row].numpy().tobytes() == number.to_bytes(8, "little")
    assert words.numpy().dtype == np.int32
