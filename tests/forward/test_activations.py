"""Hidden states keep their values in memory and in a file alike."""

import os
import tempfile

import pytest
import torch
from streamed import mixed_batches

from moetools.errors import UserError
from moetools.forward.activations import Activations, activation_bytes

TOKENS = 3 * 20 + 2 * 20 + 4 * 9 + 3 * 20 + 1 * 33


def make(budget: int, dtype: torch.dtype = torch.float32) -> Activations:
    return Activations(mixed_batches(), width=7, dtype=dtype, device=torch.device("cpu"), budget=budget)


def random_hidden(seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*batch.input_ids.shape, 7, generator=generator).to(dtype) for batch in mixed_batches()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [0, 10**9])
def test_what_is_set_is_read(budget, dtype):
    activations = make(budget, dtype)
    assert activations.spilled == (budget == 0)
    for turn in range(2):
        for number, hidden in enumerate(random_hidden(turn, dtype)):
            activations[number] = hidden
        for number, hidden in enumerate(random_hidden(turn, dtype)):
            assert activations[number].dtype == dtype
            assert torch.equal(activations[number], hidden)


def test_the_budget_decides():
    nbytes = TOKENS * 7 * 4
    assert activation_bytes(mixed_batches(), 7, torch.float32) == make(0).nbytes == nbytes
    assert not make(nbytes).spilled
    assert make(nbytes - 1).spilled


def test_no_file_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    activations = make(0)
    assert list(tmp_path.iterdir()) == []
    for number, hidden in enumerate(random_hidden(0)):
        activations[number] = hidden
    assert torch.equal(activations[4], random_hidden(0)[4])


def test_spilled_activations_are_a_mapped_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    activations = make(0)
    with open("/proc/self/maps") as maps:  # noqa: PTH123 - not a file of ours
        assert str(tmp_path) in maps.read()
    assert activations.spilled


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    def full(*_args: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"no room for 6.41 kB of activations in .*No space left") as caught:
        make(0)
    assert "TMPDIR" in caught.value.hint
    assert list(tmp_path.iterdir()) == []
