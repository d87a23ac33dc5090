"""The coder of the older layout alone, against exact integer arithmetic in plain Python."""

import math

import pytest
import torch
from lanes_writer import encode

from moetools.formats.entropy import lane_coder


def table(*weights: float) -> list[int]:
    """Frequencies of sum 4096 in proportion to `weights`, the remainder to the largest."""
    frequencies = [max(1, int(weight / sum(weights) * 4096)) for weight in weights]
    frequencies[frequencies.index(max(frequencies))] += 4096 - sum(frequencies)
    return frequencies


def big_integer_code(symbols: list[int], tables: list[list[int]]) -> int:
    """The same numeral system without any limit on the state: one integer for the whole message."""
    state = 2**15
    for symbol, frequencies in reversed(list(zip(symbols, tables, strict=True))):
        frequency, start = frequencies[symbol], sum(frequencies[:symbol])
        state = state // frequency * 4096 + state % frequency + start
    return state


def coded(symbol_SL: torch.Tensor, table_S: torch.Tensor, frequency_KA: torch.Tensor) -> lane_coder.Streams:
    return encode(symbol_SL, table_S, frequency_KA)


@pytest.mark.parametrize("lanes", [1, 3, 50])
def test_decoding_inverts_encoding_under_changing_tables(lanes: int) -> None:
    generator = torch.Generator().manual_seed(lanes)
    frequency_KA = torch.tensor([table(1, 2, 90, 5), table(30, 30, 1, 30), table(1, 1, 1, 1000)])
    table_I = torch.tensor([0, 2, 1, 1, 0])
    symbol_SL = torch.randint(0, 4, (35, lanes), generator=generator)
    streams = coded(symbol_SL, table_I.repeat(7), frequency_KA)
    decoded_SL = lane_coder.decode(streams, 35, table_I[None], frequency_KA[None])
    assert decoded_SL is not None
    assert torch.equal(decoded_SL.long(), symbol_SL)


def test_the_length_is_that_of_the_exact_numeral_system() -> None:
    """Leaving and entering 16 bits at a time costs nothing but rounding: as long as one unlimited integer."""
    generator = torch.Generator().manual_seed(0)
    frequencies = table(2, 10, 80, 8)
    symbol_SL = torch.multinomial(torch.tensor(frequencies).float(), 2000, replacement=True, generator=generator)[
        :, None
    ]
    streams = coded(symbol_SL, torch.zeros(2000, dtype=torch.long), torch.tensor([frequencies]))
    exact = big_integer_code(symbol_SL[:, 0].tolist(), [frequencies] * 2000)
    bits = 16 * len(streams.word_W) + math.log2(float(streams.state_L))
    assert bits == pytest.approx(math.log2(exact), abs=2)


def test_lanes_of_several_matrices_decode_together() -> None:
    generator = torch.Generator().manual_seed(0)
    frequency_MKA = torch.tensor([[table(1, 9, 1)], [table(5, 1, 5)]])
    symbols = [torch.randint(0, 3, (20, 4), generator=generator) for _ in range(2)]
    zeros = torch.zeros(20, dtype=torch.long)
    parts = [coded(symbol, zeros, frequency_MKA[number]) for number, symbol in enumerate(symbols)]
    joined = lane_coder.Streams(
        state_L=torch.cat([part.state_L for part in parts]),
        length_L=torch.cat([part.length_L for part in parts]),
        word_W=torch.cat([part.word_W for part in parts]),
    )
    decoded_SL = lane_coder.decode(joined, 20, torch.zeros(2, 5, dtype=torch.long), frequency_MKA)
    assert decoded_SL is not None
    assert torch.equal(decoded_SL.long(), torch.cat(symbols, 1))


def test_a_certain_symbol_costs_nothing() -> None:
    streams = coded(torch.ones(500, 2, dtype=torch.long), torch.zeros(500, dtype=torch.long), torch.tensor([[0, 4096]]))
    assert len(streams.word_W) == 0


def test_damaged_words_and_states_do_not_end_where_they_should() -> None:
    """Without any checksum: the final state alone tells."""
    generator = torch.Generator().manual_seed(0)
    frequency_KA, zeros = torch.tensor([table(3, 5, 4)]), torch.zeros(100, dtype=torch.long)
    streams = coded(torch.randint(0, 3, (100, 2), generator=generator), zeros, frequency_KA)
    for place in range(len(streams.word_W)):
        words = streams.word_W.clone()
        words[place] ^= 1 << place % 16
        damaged = lane_coder.Streams(state_L=streams.state_L, length_L=streams.length_L, word_W=words)
        assert lane_coder.decode(damaged, 100, zeros[None, :1], frequency_KA[None]) is None
    shorter = lane_coder.Streams(state_L=streams.state_L, length_L=streams.length_L, word_W=streams.word_W[:-1])
    assert lane_coder.decode(shorter, 100, zeros[None, :1], frequency_KA[None]) is None


def test_tensors_run_as_arrays_do() -> None:
    """What runs on CUDA, on the CPU: slots, final states and places are those of the numpy run."""
    generator = torch.Generator().manual_seed(0)
    frequency_KA, table_S = torch.tensor([table(1, 9, 1), table(5, 1, 5)]), torch.tensor([0, 1] * 20)
    streams = coded(torch.randint(0, 3, (40, 7), generator=generator), table_S, frequency_KA)
    _, frequency, place = lane_coder._slots(frequency_KA)
    end_L = streams.length_L.cumsum(0).int()
    word = torch.cat([streams.word_W, torch.zeros(41, dtype=torch.int32)])
    arrays = (
        table_S[:2, None].int() * 4096,
        frequency,
        place,
        word,
        streams.state_L.int(),
        end_L - streams.length_L.int(),
    )
    with_torch, with_numpy = torch.zeros(2, 40, 7, dtype=torch.int32)
    state_L, next_L = lane_coder._run(with_torch, *arrays)
    state, following = lane_coder._run(with_numpy.numpy(), *(array.numpy() for array in arrays))
    assert torch.equal(with_torch, with_numpy)
    assert state_L.tolist() == state.tolist() == [2**15] * 7
    assert next_L.tolist() == following.tolist() == end_L.tolist()
