"""The tensors of a GGUF file: their names, the tensors they are made of, and their bytes.

Packed tensors keep their codes (`gguf_blocks`). What is not packed stays BF16, F16 or F32 as it is on disk; vectors
and routers are F32. The experts of a layer become one 3-D tensor.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moetools.architectures.base import find_architecture
from moetools.architectures.engines import ENGINES
from moetools.architectures.gguf_family import GgufFamily
from moetools.architectures.pieces import Change, Piece, Rows, part_of_rows
from moetools.checkpoint.reader import Checkpoint
from moetools.errors import UnsupportedModelError, UserError
from moetools.formats.gguf_blocks import WIDENING, Ternary, decoded_blocks, encode_blocks, kind_of, package
from moetools.formats.reader import PackedCheckpoint
from moetools.grids.base import Quantized
from moetools.plugins import load_plugin, plugin_names

_FAMILIES = "moetools.architectures.families"
_EMBEDDINGS = "token_embd.weight"
_ROLES = {"w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up", "w2": "down", "down_proj": "down"}
_EXPERT = re.compile(r"model\.layers\.(\d+)\..*\.experts\.(\d+)\.(\w+)\.weight$")
_ROUTER = re.compile(r"\.(gate|shared_expert_gate|router(\.layer)?)\.weight$")
_TYPES = ["TQ1_0", "TQ2_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q5_0", "Q8_0", "Q4_1", "Q5_1", "MXFP4"]
_TYPES += ["BF16", "F16", "F32"]
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of the file.

    Attributes:
        name: its name there.
        parts: the tensors it is made of; several are stacked.
        kind: its type in GGUF.
        heads: heads whose rows are reordered, where llama.cpp rotates neighbouring pairs; of `keys` and `values`, all.
        rows, transposed: see `Piece`.
        widths: rows of a head that belong to keys and to values.
        order: the rows it holds, where `rows` does not tell.
        change: what becomes of its values, see `GgufFamily.changed`.
    """

    name: str
    parts: tuple[str, ...]
    kind: str
    heads: int = 0
    rows: Rows = "all"
    transposed: bool = False
    widths: tuple[int, int] = (0, 0)
    order: Tensor | None = None
    change: Change | None = None


def family_of(config: Mapping[str, Any]) -> GgufFamily:
    """How llama.cpp has the family.

    Raises:
        UnsupportedModelError: it is not written.
    """
    found = find_architecture(config).gguf
    if found is None:
        names = [name.replace("-", "_") for name in plugin_names(_FAMILIES)]
        written = [name for name in names if load_plugin(_FAMILIES, name, kind="model family").ARCHITECTURE.gguf]
        written += [name for name, engines in ENGINES.items() if "gguf" in engines]
        raise UnsupportedModelError(
            f"GGUF: model_type '{config.get('model_type')}' is not written", hint=f"written: {', '.join(written)}"
        )
    return found


def written_names(source: Checkpoint) -> Iterator[str]:
    """Tensors on disk that llama.cpp has: all but multi-token prediction and stored rotary tables."""
    arch, config = find_architecture(source.config), source.config
    for name in source.tensors:
        if not (
            arch.is_extra(name, config) or arch.predicts_more(name, config) or name.endswith("rotary_emb.inv_freq")
        ):
            yield name


def dense_lead(source: Checkpoint) -> int:
    """Leading layers with a dense FFN.

    Raises:
        UnsupportedModelError: a dense layer behind one with experts, or in a family that has none in llama.cpp.
    """
    dense = re.compile(r"model\.layers\.(\d+)\.mlp\.gate_proj\.weight$")
    layers = sorted(int(found[1]) for name in source.tensors if (found := dense.match(name)))
    layers = [layer for layer in layers if layer < source.config["num_hidden_layers"]]
    family = family_of(source.config)
    if layers and not family.dense_layers:
        raise UnsupportedModelError(f"GGUF: dense layer {layers[0]}: llama.cpp has experts in every layer here")
    if layers != list(range(len(layers))):
        raise UnsupportedModelError(f"GGUF: dense layer {layers[-1]}: llama.cpp has dense layers at the beginning only")
    return len(layers)


def make_entries(source: Checkpoint, ternary: Ternary) -> list[Entry]:
    """All tensors of the file.

    Raises:
        UnsupportedModelError: a tensor without a name in llama.cpp.
        UserError: experts of one layer that no common type holds.
    """
    gguf = package()
    family = family_of(source.config)
    architecture = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[family.name]
    names = gguf.get_tensor_name_map(architecture, source.config["num_hidden_layers"])
    experts: dict[tuple[int, str], dict[int, str]] = {}
    found: list[Entry] = []
    for name in written_names(source):
        expert = _EXPERT.match(name)
        if expert and expert[3] in _ROLES:
            experts.setdefault((int(expert[1]), _ROLES[expert[3]]), {})[int(expert[2])] = name
            continue
        if pieces := [(piece, match[1]) for piece in family.pieces if (match := re.fullmatch(piece.tensor, name))]:
            found += [_piece(source, name, piece, layer, ternary) for piece, layer in pieces]
            continue
        known = name.replace("e_score_correction_bias", "e_score_correction.bias")
        new = names.get_name(known, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise UnsupportedModelError(f"GGUF: no name for '{name}'")
        kind = _kind(source, name, ternary)
        change = next((change for pattern, change in family.changed if re.fullmatch(pattern, name)), None)
        found.append(Entry(name=new, parts=(name,), kind=kind, heads=_heads(source.config, name), change=change))
        if new == _EMBEDDINGS and "lm_head.weight" not in source.tensors and family.own_head:
            found.append(replace(found[-1], name="output.weight"))
    return found + [_stacked(source, *place, parts, ternary) for place, parts in experts.items()]


def _stacked(source: Checkpoint, layer: int, role: str, parts: Mapping[int, str], ternary: Ternary) -> Entry:
    here = tuple(parts[expert] for expert in sorted(parts))
    kinds = {_kind(source, name, ternary) for name in here}
    # One type for all experts: the widest holds the codes of the others as they are.
    kind = max(kinds, key=_TYPES.index)
    if len(kinds) > 1 and not any(kinds <= {*chain} for chain in WIDENING):
        raise UserError(f"GGUF: layer {layer} has {role} projections of types {', '.join(sorted(kinds))}")
    return Entry(name=f"blk.{layer}.ffn_{role}_exps.weight", parts=here, kind=kind)


def _piece(source: Checkpoint, name: str, piece: Piece, layer: str, ternary: Ternary) -> Entry:
    config = source.config
    latent = piece.rows in ("keys", "values")
    kind = _kind(source, name, ternary)
    if piece.rows == "keys" and kind not in _PLAIN:
        # Its groups of columns lie across the rows of the file's matrix.
        kind = "BF16"
    if piece.name.endswith("bias") or piece.value is not None:
        kind = "F32"
    return Entry(
        name=piece.name.format(layer=layer),
        parts=(name,),
        kind=kind,
        heads=config["num_attention_heads"] if latent else 0,
        rows=piece.rows,
        transposed=piece.transposed,
        widths=(config["qk_nope_head_dim"], config["v_head_dim"]) if latent else (0, 0),
        order=None if piece.order is None else piece.order(config),
        change=piece.value,
    )


def _kind(source: Checkpoint, name: str, ternary: Ternary) -> str:
    if isinstance(source, PackedCheckpoint) and name in source.packed:
        kind = kind_of(source.packed[name].grid, columns_of(source, name), ternary)
        if kind is None:
            raise UserError(
                f"GGUF: '{name}' is stored in a way that no type holds",
                hint="write a plain checkpoint with `expand` first",
            )
        return kind
    info = source.tensors[name]
    vector = sum(size > 1 for size in info.shape) < 2 or not name.endswith(("weight", "_proj"))
    return "F32" if vector or _ROUTER.search(name) or info.dtype not in ("BF16", "F16") else info.dtype


def columns_of(source: Checkpoint, name: str) -> int:
    """Input columns of a matrix on disk, which some families store transposed."""
    turned = any(piece.transposed and re.fullmatch(piece.tensor, name) for piece in family_of(source.config).pieces)
    return source.tensors[name].shape[-2 if turned else -1]


def _heads(config: Mapping[str, Any], name: str) -> int:
    if not family_of(config).neighbours:
        return 0
    if re.search(r"self_attn\.q_proj\.", name):
        return config["num_attention_heads"]
    if re.search(r"self_attn\.k_proj\.", name):
        return config.get("num_key_value_heads") or config["num_attention_heads"]
    return 0


def shape_of(source: Checkpoint, entry: Entry) -> tuple[int, ...]:
    """Shape of the file's tensor, outermost first."""
    shape = source.tensors[entry.parts[0]].shape
    if entry.name.endswith(("ffn_gate_inp_shexp.weight", "exp_probs_b.bias")):
        return shape[-1:]
    if len(entry.parts) > 1 or _EXPERT.match(entry.parts[0]):
        return (len(entry.parts), *shape)
    if entry.rows in ("keys", "values"):
        keys, values = entry.widths
        return (entry.heads, shape[1], keys) if entry.rows == "keys" else (entry.heads, values, shape[1])
    if entry.change is not None:
        return tuple(entry.change(torch.zeros(shape)).shape)
    if entry.transposed:
        shape = (*shape[:-2], shape[-1], shape[-2])
    if entry.order is not None:
        return (len(entry.order), *shape[1:])
    if entry.rows == "all":
        return shape
    axis = -1 if entry.name.endswith("bias") else -2
    return tuple(size // 2 if place == len(shape) + axis else size for place, size in enumerate(shape))


def row_order(entry: Entry, rows: int) -> Tensor:
    """Output rows of the tensor on disk, in the order of the file's."""
    if entry.order is not None:
        return entry.order
    every = torch.arange(rows)
    if entry.rows in ("keys", "values"):
        per_head = every.view(entry.heads, sum(entry.widths))
        keys = entry.widths[0]
        return (per_head[:, :keys] if entry.rows == "keys" else per_head[:, keys:]).reshape(-1)
    if entry.heads:
        return every.view(entry.heads, 2, -1).transpose(1, 2).reshape(-1)
    return part_of_rows(entry.rows, rows)


def _arranged(entry: Entry, value: Tensor) -> Tensor:
    """Values as they lie in the file, but for the outermost shape."""
    if entry.change is not None:
        return entry.change(value).contiguous()
    value = value.transpose(-1, -2) if entry.transposed else value
    axis = -1 if entry.name.endswith("bias") and value.ndim > 1 and "exps" in entry.name else max(value.ndim - 2, 0)
    value = value.index_select(axis, row_order(entry, value.shape[axis]))
    if entry.rows == "keys":
        value = value.view(entry.heads, entry.widths[0], -1).transpose(1, 2)
    return value.contiguous()


def bytes_of(source: Checkpoint, entry: Entry) -> np.ndarray:
    """The tensor's blocks, flat bytes."""
    return np.concatenate([_part_bytes(source, name, entry) for name in entry.parts]).reshape(-1)


def _part_bytes(source: Checkpoint, name: str, entry: Entry) -> np.ndarray:
    if entry.kind in _PLAIN:
        plain = _arranged(entry, source.read([name])[name]).to(_PLAIN[entry.kind])
        return plain.view(torch.uint8).numpy().reshape(-1)
    return encode_blocks(_quantized(source, name, entry), entry.kind, name)


def _quantized(source: Checkpoint, name: str, entry: Entry) -> Quantized:
    """Codes and scales, with the rows in the order of the file's."""
    assert isinstance(source, PackedCheckpoint)
    quantized = source.quantized(name)
    return quantized.rows(row_order(entry, quantized.codes_BOI.shape[1]))


def meant_of(source: Checkpoint, entry: Entry) -> np.ndarray:
    """The tensor's values, fp32, as `decoded_blocks` has them."""
    values = []
    for name in entry.parts:
        if entry.kind in _PLAIN:
            value = _arranged(entry, source.read([name])[name]).to(_PLAIN[entry.kind]).float()
        else:
            value = decoded_blocks(_quantized(source, name, entry), entry.kind)
        values.append(value.numpy())
    return np.stack(values).reshape(shape_of(source, entry))
