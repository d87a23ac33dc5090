"""Every decoder of the chunked layout says what the reference decoder says, of whole and of damaged code."""

import importlib
import importlib.util
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
import torch
from coded_matrices import agree, any_matrix, damaged, random_matrix, reference
from hypothesis import given, settings
from hypothesis import strategies as st

from moetools.errors import CheckpointError
from moetools.formats.entropy import bank as banks
from moetools.formats.entropy import coder
from moetools.formats.entropy.bank import Bank

SEEDS = st.integers(0, 2**32 - 1)
ONE = {"rows": 20, "columns": 50, "highest": 5, "tables": 3, "steps": 8, "rate": 0.3}


@pytest.fixture(scope="session", params=["with_arrays", "with_numba"])
def decoder(request: pytest.FixtureRequest) -> ModuleType:
    if request.param == "with_numba":
        pytest.importorskip("numba")
    return importlib.import_module(f"moetools.formats.entropy.{request.param}")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SEEDS)
def test_the_reference_inverts_the_encoder(seed: int) -> None:
    matrix, codes_OI = any_matrix(np.random.default_rng(seed))
    found = reference(matrix)
    assert found is not None
    assert torch.equal(found, codes_OI.flatten())


def test_the_reference_is_the_exact_numeral_system() -> None:
    """One chunk, every state an integer without limit: the code is as long as their logarithms say."""
    matrix, codes_OI = random_matrix(np.random.default_rng(0), **{**ONE, "rows": 200, "steps": 4000, "columns": 64})
    frequency_KA = matrix.frequency_KA.tolist()
    states = [coder.LOW] * coder.LANES
    symbols = [[code + 5 for code in row] for row in codes_OI.tolist()]
    flat = [(table, symbol) for row in symbols for table, symbol in zip(matrix.table_I.tolist(), row, strict=True)]
    for number, (table, symbol) in reversed(list(enumerate(flat))):
        width, start = frequency_KA[table][symbol], sum(frequency_KA[table][:symbol])
        state = states[number % coder.LANES]
        states[number % coder.LANES] = state // width * coder.TOTAL + state % width + start
    exact = sum(math.log2(state) for state in states)
    bits = 16 * len(matrix.code.word_W) + sum(math.log2(state) for state in matrix.code.state_CL.flatten().tolist())
    assert bits == pytest.approx(exact, rel=1e-4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SEEDS)
def test_whole_code(decoder: ModuleType, seed: int) -> None:
    """Some matrices of a bank, in any order and more than once."""
    generator = np.random.default_rng(seed)
    matrices = [any_matrix(generator)[0] for _ in range(generator.integers(1, 4))]
    agree(decoder, matrices, generator.integers(0, len(matrices), generator.integers(1, 5)).tolist())


@settings(max_examples=150, deadline=None, derandomize=True)
@given(SEEDS)
def test_damaged_code(decoder: ModuleType, seed: int) -> None:
    generator = np.random.default_rng(seed)
    matrices = [any_matrix(generator)[0] for _ in range(3)]
    matrices[1] = damaged(generator, matrices[1])
    agree(decoder, matrices, [0, 1, 2])


def test_every_changed_word_is_noticed(decoder: ModuleType) -> None:
    matrix, _ = random_matrix(np.random.default_rng(1), **ONE)
    for place in range(len(matrix.code.word_W)):
        word_W = matrix.code.word_W.clone()
        word_W[place] ^= 1 << place % 15
        plan = Bank.join([replace(matrix, code=replace(matrix.code, word_W=word_W))])._plan(np.array([0]))
        assert not bool(decoder.decode(plan)[1].all())


def test_a_chunk_that_asks_for_more_words_than_there_are_ends(decoder: ModuleType) -> None:
    """No words at all behind states that need one at each of 100,000 steps; the bank's guard is all there is."""
    rare = {"rows": 40, "columns": 5000, "highest": 127, "tables": 1, "steps": 100_000, "rate": 1.0}
    matrix, _ = random_matrix(np.random.default_rng(2), **rare)
    assert len(matrix.code.word_W) > 1000
    empty = replace(matrix.code, word_W=matrix.code.word_W[:0], length_C=matrix.code.length_C * 0)
    plan = Bank.join([replace(matrix, code=empty)])._plan(np.array([0]))
    assert not bool(decoder.decode(plan)[1].any())


def test_threads_and_shares_change_nothing() -> None:
    matrices, codes = zip(*(any_matrix(np.random.default_rng(seed)) for seed in range(8)), strict=True)
    bank = Bank.join(list(matrices))
    with mock.patch.dict(banks._DECODE_WEIGHTS, {"cpu": 1000}), mock.patch.object(banks, "_DECODE_MATRICES", 2):
        parts = bank.codes(range(8))
    assert all(torch.equal(part, code) for part, code in zip(parts, codes, strict=True))
    numba = pytest.importorskip("numba") and importlib.import_module("moetools.formats.entropy.with_numba")
    with mock.patch.object(numba, "_THREAD_WEIGHTS", 500), mock.patch("torch.get_num_threads", return_value=5):
        codes_N, good_C = numba.decode(bank._plan(np.arange(8)))
    assert bool(good_C.all())
    assert torch.equal(codes_N, torch.cat([code.flatten() for code in codes]))


def test_a_damaged_matrix_among_others_is_named() -> None:
    generator = np.random.default_rng(3)
    matrices = [replace(random_matrix(generator, **ONE)[0], name=f"m{number}") for number in range(5)]
    state_CL = matrices[3].code.state_CL + 1
    matrices[3] = replace(matrices[3], code=replace(matrices[3].code, state_CL=state_CL))
    with pytest.raises(CheckpointError, match=r"the code of 'm3' does not end where it should"):
        Bank.join(matrices).dense([[1], [3, 0]], torch.float32)


@pytest.mark.parametrize("value", [0.0, 1e-40, 3.4e38, 1.0000001, 0.00390625])
def test_rounding_to_bfloat16_is_torchs(value: float) -> None:
    numba = pytest.importorskip("numba") and importlib.import_module("moetools.formats.entropy.with_numba")
    codes_OI = torch.arange(-127, 128).to(torch.int8).view(5, 51)
    step_I = value * torch.linspace(0.5, 1, 51)
    found_OI = torch.empty(5, 51, dtype=torch.bfloat16)
    numba.times_step(codes_OI, step_I, found_OI)
    assert torch.equal(found_OI, (codes_OI.float() * step_I).bfloat16())


def test_tensors_run_as_arrays_do() -> None:
    """What runs on CUDA without Triton, on the CPU."""
    from moetools.formats.entropy import with_arrays

    matrices = [any_matrix(np.random.default_rng(seed))[0] for seed in range(4)]
    plan = Bank.join(matrices)._plan(np.arange(4))
    expected = with_arrays.decode(plan)
    with mock.patch.object(with_arrays, "_on_gpu", return_value=True):
        found = with_arrays.decode(plan)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_in_its_interpreter() -> None:
    """A process of its own: the interpreter must be asked for before triton is imported for the first time."""
    folder = Path(__file__).parent
    code = (
        "import numpy as np\n"
        "from coded_matrices import agree, any_matrix, damaged\n"
        "from moetools.formats.entropy import with_triton\n"
        "for seed in range(25):\n"
        "    generator = np.random.default_rng(seed)\n"
        "    matrices = [any_matrix(generator)[0] for _ in range(3)]\n"
        "    if seed % 2:\n"
        "        matrices[1] = damaged(generator, matrices[1])\n"
        "    agree(with_triton, matrices, [2, 1, 0])\n"
        "print('agreed')\n"
    )
    path = os.pathsep.join([str(folder), str(folder.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "agreed", done.stderr


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_every_decoder_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from moetools.formats.entropy import with_arrays

    matrices, codes = zip(*(any_matrix(np.random.default_rng(seed)) for seed in range(8)), strict=True)
    bank = Bank.join(list(matrices))
    moved = bank.on({name: tensor.cuda() for name, tensor in bank.tensors.items()})
    decoders = [with_arrays]
    if importlib.util.find_spec("triton") is not None:
        decoders.append(importlib.import_module("moetools.formats.entropy.with_triton"))
    for decoder in decoders:
        codes_N, good_C = decoder.decode(moved._plan(np.arange(8)))
        assert bool(good_C.all())
        assert torch.equal(codes_N.cpu(), torch.cat([code.flatten() for code in codes]))
