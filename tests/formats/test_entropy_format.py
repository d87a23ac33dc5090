"""Entropy-coded matrices on disk: exact for any codes, close to the information in them, damage always found."""

import math
import struct
import zlib
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lanes_writer import pack as pack_lanes

from moetools.errors import CheckpointError
from moetools.formats import entropy
from moetools.formats.entropy import dense_many, shape, unpack, unpack_many
from moetools.grids.base import Params, Quantized
from moetools.grids.entropy import EntropyGrid, scale_factors, stream_bits

Pack = Callable[[str, Quantized], dict[str, torch.Tensor]]
NAME = "model.layers.0.mlp.experts.3.up_proj.weight"


@pytest.fixture(params=["chunks", "lanes"])
def pack(request: pytest.FixtureRequest) -> Pack:
    """The writer of a layout: the one that moetools writes, and the one that it wrote."""
    return {"chunks": entropy.pack, "lanes": pack_lanes}[request.param]


def matrix(codes_OI: torch.Tensor, *, levels: int = 127, seed: int = 0) -> Quantized:
    """Codes with steps such as `EntropyGrid.fit` makes."""
    columns = codes_OI.shape[1]
    exponent_I = torch.randint(-9, 9, (columns,), generator=torch.Generator().manual_seed(seed))
    step_I = torch.tensor(0.0123) * scale_factors(exponent_I - exponent_I[:1])
    params = Params(scale_BOG=step_I.expand(1, *codes_OI.shape))
    return Quantized(grid=EntropyGrid(rate=1.0, levels=levels), codes_BOI=codes_OI[None].to(torch.int8), params=params)


def laplace(rows: int, columns: int, width: float, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    uniform_OI = torch.rand(rows, columns, generator=generator) - 0.5
    value_OI = -width * uniform_OI.sign() * (1 - 2 * uniform_OI.abs()).clamp(min=1e-9).log()
    return value_OI.round().clamp(-127, 127).to(torch.int8)


def alternating(rows: int, columns: int, value: int) -> torch.Tensor:
    sign_I = torch.where(torch.arange(columns) % 2 == 0, 1, -1)
    return (sign_I * value).expand(rows, columns).to(torch.int8)


CASES = {
    "random": laplace(48, 40, 0.6),
    "wide": laplace(48, 40, 60.0),
    "every code": torch.arange(-127, 128).to(torch.int8).view(15, 17),
    "all zero": torch.zeros(33, 20, dtype=torch.int8),
    "constant": torch.full((33, 20), 5, dtype=torch.int8),
    "all lowest": torch.full((9, 50), -127, dtype=torch.int8),
    "alternating extremes": alternating(10, 31, 127),
    "one weight": torch.tensor([[-3]], dtype=torch.int8),
    "one column": laplace(300, 1, 2.0),
    "one row": laplace(1, 5001, 1.0),
    "rows longer than a lane": laplace(3, 4500, 0.4),
    "a last lane that is not full": laplace(211, 97, 0.8),
    "no rows": torch.zeros(0, 12, dtype=torch.int8),
    "no columns": torch.zeros(12, 0, dtype=torch.int8),
    "one outlier": torch.zeros(64, 64, dtype=torch.int8).index_fill_(0, torch.tensor([7]), 127),
    "zeros and signs by row": alternating(64, 64, 1) * (torch.arange(64)[:, None] % 3 == 0),
}


@pytest.mark.parametrize("case", CASES)
def test_codes_and_steps_come_back_exactly(pack: Pack, case: str) -> None:
    quantized = matrix(CASES[case])
    tensors = pack(NAME, quantized)
    back = unpack(NAME, tensors)
    assert list(tensors) == [f"{NAME}_entropy"]
    assert back.codes_BOI.dtype == torch.int8
    assert torch.equal(back.codes_BOI, quantized.codes_BOI)
    assert torch.equal(back.dequantize(), quantized.dequantize())
    assert back.grid == quantized.grid
    assert shape(NAME, tensors) == tuple(CASES[case].shape)


@pytest.mark.parametrize("highest", [1, 2, 3, 7, 31, 64, 127])
def test_every_size_of_alphabet(pack: Pack, highest: int) -> None:
    generator = torch.Generator().manual_seed(highest)
    codes_OI = torch.randint(-highest, highest + 1, (60, 70), generator=generator)
    quantized = matrix(codes_OI, levels=highest)
    assert torch.equal(unpack(NAME, pack(NAME, quantized)).codes_BOI[0].long(), codes_OI)


def test_what_fit_makes_can_be_packed(pack: Pack) -> None:
    weight_BOI = torch.randn(2, 96, 128, generator=torch.Generator().manual_seed(0))
    quantized = EntropyGrid(rate=1.5).quantize(weight_BOI, torch.rand(2, 128) + 0.01)
    for index in range(2):
        one = quantized.matrix(index)
        assert torch.equal(unpack(NAME, pack(NAME, one)).dequantize(), one.dequantize())


def test_many_matrices_of_mixed_shapes_and_alphabets(pack: Pack) -> None:
    cases = [matrix(laplace(64, 96, width, seed=number), seed=number) for number, width in enumerate([0.1, 3.0, 40.0])]
    cases[1:1] = [matrix(laplace(96, 64, 1.0)), matrix(torch.zeros(64, 96))]
    named = [(f"x{number}", pack(f"x{number}", one)) for number, one in enumerate(cases)]
    for back, one in zip(unpack_many(named), cases, strict=True):
        assert torch.equal(back.codes_BOI, one.codes_BOI)
        assert torch.equal(back.dequantize(), one.dequantize())


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 70), columns=st.integers(1, 70), width=st.floats(0.01, 60.0), seed=st.integers(0, 2**16))
def test_any_shape_and_rate(pack: Pack, rows: int, columns: int, width: float, seed: int) -> None:
    quantized = matrix(laplace(rows, columns, width, seed=seed), seed=seed)
    assert torch.equal(unpack(NAME, pack(NAME, quantized)).dequantize(), quantized.dequantize())


@pytest.mark.parametrize("width", [0.15, 0.4, 1.0, 5.0])
def test_size_is_close_to_the_entropy(pack: Pack, width: float) -> None:
    """Within one percent, a byte per column (step and table), states and lengths, and header and tables."""
    codes_OI = laplace(512, 1024, width)
    _, count = codes_OI.unique(return_counts=True)
    entropy = float(-(count * (count / count.sum()).log2()).sum())
    quantized = matrix(codes_OI)
    bits = 8 * pack(NAME, quantized)[f"{NAME}_entropy"].numel()
    assert entropy * 0.995 < bits < entropy * 1.01 + 8 * 1024 + 8 * 33 * 32 + 8 * 200
    assert bits == pytest.approx(float(stream_bits(quantized)), rel=0.015)


def test_zeros_take_next_to_nothing(pack: Pack) -> None:
    quantized = matrix(torch.zeros(512, 1024))
    assert 8 * pack(NAME, quantized)[f"{NAME}_entropy"].numel() < 0.03 * 512 * 1024


@pytest.mark.parametrize("case", ["random", "all zero", "one weight"])
def test_every_flipped_byte_is_found(pack: Pack, case: str) -> None:
    blob = pack(NAME, matrix(CASES[case]))[f"{NAME}_entropy"]
    for place in range(len(blob)):
        damaged = blob.clone()
        damaged[place] ^= 1 << place % 8
        with pytest.raises(CheckpointError, match="up_proj"):
            unpack(NAME, {f"{NAME}_entropy": damaged})


def test_cut_off_lengthened_and_missing_bytes_are_found(pack: Pack) -> None:
    blob = pack(NAME, matrix(CASES["random"]))[f"{NAME}_entropy"]
    for damaged in (blob[:-1], blob[:10], blob[:0], torch.cat([blob, blob[:1]]), blob.float()):
        with pytest.raises(CheckpointError, match="up_proj"):
            unpack(NAME, {f"{NAME}_entropy": damaged})
    with pytest.raises(CheckpointError, match="missing"):
        unpack(NAME, {})


def test_a_wrong_code_under_a_right_checksum_is_found(pack: Pack) -> None:
    """The coder does not end in the state it must end in."""
    blob = pack(NAME, matrix(CASES["random"]))[f"{NAME}_entropy"].numpy().tobytes()
    body = bytearray(blob[36:])
    body[-3] ^= 16
    forged = blob[:32] + struct.pack("<I", zlib.crc32(bytes(body), zlib.crc32(blob[:32]))) + bytes(body)
    with pytest.raises(CheckpointError, match="does not end where it should"):
        unpack(NAME, {f"{NAME}_entropy": torch.frombuffer(bytearray(forged), dtype=torch.uint8)})


def test_weights_are_codes_times_steps(pack: Pack) -> None:
    """Matrices of both layouts side by side, in every dtype."""
    cases = [matrix(laplace(64, 96, 1.0)), matrix(laplace(200, 300, 0.3)), matrix(laplace(5, 7, 9.0))]
    named = [(f"x{number}", pack(f"x{number}", one)) for number, one in enumerate(cases)]
    named.insert(1, ("other", pack_lanes("other", cases[2])))
    expected = [one.codes_BOI[0].float() * one.params.scale_BOG[0] for one in (cases[0], cases[2], *cases[1:])]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for found, value in zip(dense_many(named, dtype), expected, strict=True):
            assert torch.equal(found, value.to(dtype))


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no entropy-coded matrix of a known version"):
        unpack(NAME, {f"{NAME}_entropy": torch.frombuffer(bytearray(b"ME9" + bytes(60)), dtype=torch.uint8)})


def test_steps_that_are_not_of_the_grid_are_not_packed(pack: Pack) -> None:
    quantized = matrix(laplace(8, 8, 1.0))
    odd = Params(scale_BOG=quantized.params.scale_BOG * torch.linspace(1, math.e, 8))
    with pytest.raises(AssertionError, match=r"EntropyGrid\.fit"):
        pack(NAME, Quantized(grid=quantized.grid, codes_BOI=quantized.codes_BOI, params=odd))


@pytest.mark.gpu
def test_cuda_decodes_the_same(pack: Pack) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    quantized = matrix(laplace(211, 97, 0.8))
    tensors = {key: value.cuda() for key, value in pack(NAME, quantized).items()}
    assert torch.equal(unpack(NAME, tensors).codes_BOI.cpu(), quantized.codes_BOI)
