"""QMoE's dictionary, the peer of the entropy coder: that the comparison is fair."""

import itertools

import pytest
import qmoe_dictionary
import torch
from qmoe_dictionary import Dictionary, bits, build, decode, encode

from moetools.formats.entropy import pack
from moetools.grids.base import Params, Quantized
from moetools.grids.entropy import EntropyGrid


@pytest.fixture(scope="module")
def dictionary() -> Dictionary:
    return build()


def ternary(rows: int, columns: int, zero_probability: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    draw_OI = torch.rand(rows, columns, generator=generator)
    sign_OI = torch.where(torch.rand(rows, columns, generator=generator) < 0.5, -1, 1)
    return torch.where(draw_OI < zero_probability, 0, sign_OI).to(torch.int8)


def test_words_are_the_most_probable_runs(dictionary: Dictionary) -> None:
    """Among runs of up to three pairs, those that are in are at least as probable as those that are not."""
    weight = {0: 0.0575, 1: 0.885, 2: 0.0575}
    inside, outside = [], []
    for length in (1, 2, 3):
        for run in itertools.product(range(9), repeat=length):
            node = 0
            for pair in run:
                node = int(dictionary.child_NP[node, pair]) if node >= 0 else -1
            probability = 1.0
            for pair in run:
                probability *= weight[pair // 3] * weight[pair % 3]
            (inside if node > 0 else outside).append(probability)
    assert len(dictionary.length_N) == qmoe_dictionary.WORDS + 1
    assert min(inside) >= max(outside, default=0.0)


@pytest.mark.parametrize(("rows", "columns"), [(40, 301), (7, 64), (1, 1)])
@pytest.mark.parametrize("zero_probability", [0.3, 0.885, 1.0])
def test_round_trip(dictionary: Dictionary, rows: int, columns: int, zero_probability: float) -> None:
    codes_OI = ternary(rows, columns, zero_probability)
    words, _ = encode(codes_OI, dictionary)
    assert torch.equal(decode(words, columns, dictionary), codes_OI)


def test_the_entropy_coder_takes_less_where_the_dictionary_is_at_its_best(dictionary: Dictionary) -> None:
    codes_OI = ternary(256, 2048, 0.885)
    words, _ = encode(codes_OI, dictionary)
    params = Params(scale_BOG=torch.ones(1, 256, 2048))
    blob = pack("w", Quantized(grid=EntropyGrid(), codes_BOI=codes_OI[None], params=params))["w_entropy"]
    assert 8 * len(blob) < 0.9 * bits(words, 256)
