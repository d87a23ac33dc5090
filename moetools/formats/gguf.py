"""Writes a checkpoint as one GGUF file for llama.cpp: weights, structure and tokenizer.

Names and layouts: the `gguf` package; what each family says and how it is computed: llama.cpp's `src/models`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moetools.checkpoint.reader import Checkpoint
from moetools.errors import UnsupportedModelError, UserError, VerificationError
from moetools.formats.gguf_blocks import BLOCKS, GROUPS, Ternary, kind_of, package
from moetools.formats.gguf_header import pre_tokenizer_of, rope_of, write_structure, write_tokenizer
from moetools.formats.gguf_tensors import (
    Entry,
    bytes_of,
    columns_of,
    dense_lead,
    family_of,
    make_entries,
    meant_of,
    shape_of,
)
from moetools.formats.reader import PackedCheckpoint
from moetools.grids.base import Grid


def check_gguf(source: Checkpoint, grids: Mapping[str, Grid], *, ternary: Ternary = "TQ1_0") -> None:
    """Refuse what cannot be written or would run wrong in llama.cpp, before anything is computed.

    Args:
        grids: grid of every tensor that is (to be) packed.

    Raises:
        UnsupportedModelError: another family, or a feature that llama.cpp's version of it lacks.
        UserError: a grid or a row length without a GGUF type.
    """
    _check_family(source.config)
    pre_tokenizer_of(source)
    for name, grid in grids.items():
        columns = columns_of(source, name)
        kind = kind_of(grid, columns, ternary)
        if kind is None:
            raise UserError(
                f"GGUF: no type for {grid.describe()} ('{name}')",
                hint="`scheme=w4a16`, w8a16, q2_k to q6_k, ternary or mxfp4; `asymmetric` up to 5 bits",
            )
        block = BLOCKS[kind]
        if columns % block:
            raise UserError(
                f"GGUF: {kind} has blocks of {block} columns, '{name}' has {columns}",
                hint="`scheme=w4a16` `group_size=32`" if block > 32 and not columns % 32 else "another model",
            )
        if grid.group_size and grid.group_size % GROUPS[kind]:
            raise UserError(
                f"GGUF: {kind} has one scale for {GROUPS[kind]} columns, the grid one for {grid.group_size}",
                hint=f"`group_size={GROUPS[kind]}`",
            )
    dense_lead(source)


def export_gguf(source: Checkpoint, out: Path, *, ternary: Ternary = "TQ1_0") -> dict[str, str]:
    """Write `out` and read it back; one layer's tensors are in memory at a time.

    Args:
        source: a plain or packed checkpoint (`moetools.formats.reader.open_model`).

    Returns:
        Type of every tensor in the file.

    Raises:
        UserError, UnsupportedModelError: see `check_gguf`; the package gguf is missing.
        VerificationError: the file does not hold what was meant.
    """
    gguf = package()
    packed = source.packed if isinstance(source, PackedCheckpoint) else {}
    check_gguf(source, {name: one.grid for name, one in packed.items() if one.grid}, ternary=ternary)
    entries = make_entries(source, ternary)
    writer = gguf.GGUFWriter(str(out), family_of(source.config).name)
    write_structure(writer, source)
    write_tokenizer(writer, source)
    for entry in entries:
        shape, kind = shape_of(source, entry), gguf.GGMLQuantizationType[entry.kind]
        stored = gguf.quant_shape_to_byte_shape(shape, kind)
        writer.add_tensor_info(entry.name, stored, np.dtype(np.uint8), int(np.prod(stored)), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        writer.write_tensor_data(bytes_of(source, entry))
    writer.close()
    _verify(source, entries, out)
    return {entry.name: entry.kind for entry in entries}


def _check_family(config: Mapping[str, Any]) -> None:
    family = family_of(config)
    rope = rope_of(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" and not (kind == "yarn" and family.yarn):
        raise UnsupportedModelError(f"GGUF: rope type '{kind}' is not written; only plain rotary positions are")
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedModelError(f"GGUF: llama.cpp computes silu, config.json says {config['hidden_act']}")
    wanted = family.normalised
    if wanted is not None and bool(config.get("norm_topk_prob")) != wanted:
        raise UnsupportedModelError(
            f"GGUF: llama.cpp's {family.name} has norm_topk_prob {wanted}, config.json says {not wanted}"
        )
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads")
    if family.all_heads and groups not in (None, heads):
        raise UnsupportedModelError(
            f"GGUF: llama.cpp does not load {family.name} with {groups} key-value heads for {heads} heads"
        )
    window, length = config.get("sliding_window"), config.get("max_position_embeddings", 0)
    if not family.window and window and window < length and config.get("use_sliding_window", True):
        raise UnsupportedModelError(f"GGUF: a sliding window of {window} tokens is not written for this family")
    if family.problem and (why := family.problem(config)) is not None:
        raise UnsupportedModelError(f"GGUF: llama.cpp's {family.name} {why}")


def read_gguf(file: Path) -> Iterator[tuple[str, str, np.ndarray]]:
    """Name, type and fp32 values of every tensor of a GGUF file, as the `gguf` package dequantizes them."""
    gguf = package()
    for tensor in gguf.GGUFReader(str(file)).tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        yield tensor.name, tensor.tensor_type.name, np.asarray(values, dtype=np.float32).reshape(shape)


def _verify(source: Checkpoint, entries: list[Entry], out: Path) -> None:
    """Compare every tensor of the file, dequantized by the gguf package, with what was meant."""
    wanted = {entry.name: entry for entry in entries}
    seen = set()
    for name, kind, values in read_gguf(out):
        entry = wanted.get(name)
        seen.add(name)
        meant = None if entry is None else meant_of(source, entry)
        if entry is None or kind != entry.kind or meant is None or not np.array_equal(values, meant):
            raise VerificationError(f"{out}: tensor '{name}' ({kind}) is not what was meant")
    if seen != wanted.keys():
        raise VerificationError(f"{out}: tensor '{min(wanted.keys() - seen)}' is missing")
