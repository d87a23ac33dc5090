"""Writes an importance matrix for llama.cpp's `llama-quantize --imatrix`: what every matrix of a GGUF file sees.

A GGUF file without weights: `general.type` is "imatrix", and a tensor NAME of the model has here NAME.in_sum2, sums of
squares of its inputs [matrices, columns], and NAME.counts, tokens [matrices or 1, 1]; a reader divides the one by the
other, and takes all columns to be alike where nothing was counted (llama.cpp: tools/imatrix, common/imatrix-loader).
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from moetools.checkpoint.durable import make_durably
from moetools.checkpoint.output import check_file
from moetools.checkpoint.reader import Checkpoint
from moetools.errors import UserError
from moetools.formats.gguf_tensors import Entry, make_entries, package, shape_of

_KIND = b"general.type" + struct.pack("<IQ", 8, 7) + b"imatrix"
_HEAD = 4096

Seen = Callable[[str], tuple[Tensor, Tensor] | None]
"""Tensor on disk -> sums of squares of its inputs [B, I] and tokens [B]; None for what multiplies nothing."""


def check_imatrix(file: Path) -> None:
    """Whether an importance matrix can be written to `file`.

    Raises:
        UserError: no such folder, or the file is something else; the package gguf is missing.
    """
    package()
    check_file("imatrix", file)
    if file.exists() and not _is_imatrix(file):
        raise UserError(f"`imatrix`: '{file}' exists and is no importance matrix", hint="choose another name")


def write_imatrix(
    source: Checkpoint, file: Path, seen: Seen, *, datasets: Sequence[str], num_tokens: int, seq_len: int
) -> None:
    """Write `file` completely or not at all.

    Args:
        source: the checkpoint whose GGUF file is meant: its tensors have the names there.
        datasets: what the text is called.
    """
    gguf = package()

    def write(temporary: Path) -> None:
        # An importance matrix says no architecture.
        kind = type("Writer", (gguf.GGUFWriter,), {"add_architecture": lambda _self: None})
        writer = kind(str(temporary), "")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", list(datasets))
        writer.add_uint32("imatrix.chunk_count", max(1, num_tokens // seq_len))
        writer.add_uint32("imatrix.chunk_size", seq_len)
        for name, values in _tensors(source, seen):
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    make_durably(file, write)


def _tensors(source: Checkpoint, seen: Seen) -> Iterator[tuple[str, np.ndarray]]:
    for entry in make_entries(source, "TQ2_0"):
        known = seen(entry.parts[0])
        if known is None or not entry.name.endswith(".weight"):
            continue
        sums_BI, count_B = _per_matrix(source, entry, *known)
        yield f"{entry.name}.in_sum2", sums_BI.astype(np.float32)
        yield f"{entry.name}.counts", count_B.astype(np.float32)[:, None]


def _per_matrix(source: Checkpoint, entry: Entry, sum_BI: Tensor, count_B: Tensor) -> tuple[np.ndarray, np.ndarray]:
    sums, counts = sum_BI.numpy(), count_B.numpy()
    if entry.rows == "values":
        # One matrix per head, all on the latent; that attention averages it first is left out.
        return sums.repeat(entry.heads, axis=0), counts
    if entry.rows == "keys":
        # The file's matrix is the transpose: its columns are rows on disk, whose importance nobody measured.
        return np.zeros((entry.heads, shape_of(source, entry)[-1])), np.zeros(1)
    return sums, counts


def _is_imatrix(file: Path) -> bool:
    with file.open("rb") as stream:
        head = stream.read(_HEAD)
    return head.startswith(b"GGUF") and _KIND in head
