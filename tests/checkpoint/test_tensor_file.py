"""Files beside a model are read, never mapped: one that gets shorter is an error and not the end of the process."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moetools.checkpoint.tensor_file import open_tensor_file
from moetools.errors import CheckpointError

TENSORS = {"a": torch.arange(12.0).reshape(4, 3), "b": torch.tensor(7), "c": torch.arange(4, dtype=torch.int16)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "some.safetensors", metadata={"format": "x"})
    return tmp_path / "some.safetensors"


def test_it_reads_what_safetensors_wrote(file: Path) -> None:
    stored = open_tensor_file(file)
    assert stored.metadata == {"format": "x"}
    for name, tensor in stored.read().items():
        torch.testing.assert_close(tensor, TENSORS[name], rtol=0, atol=0)
    assert list(stored.read(["c"])) == ["c"]


def test_rows_are_those_of_the_tensor(file: Path) -> None:
    a, c = open_tensor_file(file).rows(["a", "c"], 1, 2)
    torch.testing.assert_close(a, TENSORS["a"][1:3], rtol=0, atol=0)
    torch.testing.assert_close(c, TENSORS["c"][1:3], rtol=0, atol=0)


def test_a_file_that_gets_shorter_is_an_error(file: Path) -> None:
    stored = open_tensor_file(file)
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 20)
    with pytest.raises(CheckpointError, match="it got shorter"):
        stored.read()


def test_the_package_maps_no_file() -> None:
    """safe_open and load_file map their file; those of transformers' own loading are read in a process of their own."""
    package = Path(__file__).parents[2] / "moetools"
    mapping = re.compile(r"\b(safe_open|load_file)\b")
    found = [str(file) for file in package.rglob("*.py") if mapping.search(file.read_text())]
    assert found == []
