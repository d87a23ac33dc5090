"""Writes a checkpoint as one GGUF file for llama.cpp: weights, structure and tokenizer.

Integers keep their codes: 2 to 4 bits become Q4_0, 5 bits Q5_0, 6 to 8 bits Q8_0 (blocks of 32 columns with one fp16
scale), ternary ones TQ2_0 or TQ1_0 (blocks of 256). What is not packed stays BF16, F16 or F32 as it is on disk; vectors
and routers are F32. The experts of a layer become one 3-D tensor. Names and layouts: the `gguf` package.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from moetools.architectures.base import find_architecture
from moetools.architectures.gguf_family import GgufFamily
from moetools.checkpoint.folder import read_json_object
from moetools.checkpoint.reader import Checkpoint
from moetools.errors import CheckpointError, UnsupportedModelError, UserError, VerificationError
from moetools.formats.reader import PackedCheckpoint
from moetools.grids.base import Grid, Quantized
from moetools.grids.integer import Integer
from moetools.plugins import load_plugin, plugin_names

Ternary = Literal["TQ1_0", "TQ2_0"]
_FAMILIES = "moetools.architectures.families"
_EMBEDDINGS = "token_embd.weight"
_ROLES = {"w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up", "w2": "down", "down_proj": "down"}
_EXPERT = re.compile(r"model\.layers\.(\d+)\..*\.experts\.(\d+)\.(\w+)\.weight$")
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")
_SPLITS = {_QWEN2: "qwen2", _LLAMA3: "llama-bpe"}
_HALF_LIMIT = 65504.0
_BLOCK, _TERNARY_BLOCK = 32, 256


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One tensor of the file: its name there, the tensors it is made of, and its type."""

    name: str
    parts: tuple[str, ...]
    kind: str
    heads: int = 0


def check_gguf(source: Checkpoint, grids: Mapping[str, Grid], *, ternary: Ternary = "TQ2_0") -> None:
    """Refuse what cannot be written or would run wrong in llama.cpp, before anything is computed.

    Args:
        grids: grid of every tensor that is (to be) packed.

    Raises:
        UnsupportedModelError: another family, or a feature that llama.cpp's version of it lacks.
        UserError: a grid or a row length without a GGUF type.
    """
    _check_family(source.config)
    _check_tokenizer(source)
    for name, grid in grids.items():
        if not isinstance(grid, Integer) or not grid.symmetric:
            raise UserError(
                f"GGUF: no type for {grid.describe()} ('{name}')",
                hint="`scheme=w4a16`, w5a16, w8a16 or ternary, without `asymmetric`",
            )
        columns, block = source.tensors[name].shape[-1], _TERNARY_BLOCK if grid.ternary else _BLOCK
        kind = ternary if grid.ternary else _integer_kind(grid.bits)
        if columns % block:
            raise UserError(
                f"GGUF: {kind} has blocks of {block} columns, '{name}' has {columns}",
                hint="`scheme=w4a16` `group_size=32`" if grid.ternary and not columns % _BLOCK else "another model",
            )
        if grid.group_size and grid.group_size % block:
            raise UserError(
                f"GGUF: {kind} has one scale for {block} columns, the grid one for {grid.group_size}",
                hint=f"`group_size={block}`",
            )
    dense = [name for name in source.tensors if re.search(r"\.mlp\.(gate|up|down)_proj\.weight$", name)]
    if dense:
        raise UnsupportedModelError(f"GGUF: dense layer '{dense[0]}': llama.cpp has experts in every layer here")


def export_gguf(source: Checkpoint, out: Path, *, ternary: Ternary = "TQ2_0") -> dict[str, str]:
    """Write `out` and read it back; one layer's tensors are in memory at a time.

    Args:
        source: a plain or packed checkpoint (`moetools.formats.reader.open_model`).

    Returns:
        Type of every tensor in the file.

    Raises:
        UserError, UnsupportedModelError: see `check_gguf`; the package gguf is missing.
        VerificationError: the file does not hold what was meant.
    """
    gguf = _package()
    packed = source.packed if isinstance(source, PackedCheckpoint) else {}
    check_gguf(source, {name: one.grid for name, one in packed.items() if one.grid}, ternary=ternary)
    entries = _entries(source, ternary)
    writer = gguf.GGUFWriter(str(out), _family(source.config).name)
    _write_structure(writer, source)
    _write_tokenizer(writer, source)
    for entry in entries:
        shape, kind = _shape(source, entry), gguf.GGMLQuantizationType[entry.kind]
        stored = gguf.quant_shape_to_byte_shape(shape, kind)
        writer.add_tensor_info(entry.name, stored, np.dtype(np.uint8), int(np.prod(stored)), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        writer.write_tensor_data(_bytes(source, entry))
    writer.close()
    _verify(source, entries, out)
    return {entry.name: entry.kind for entry in entries}


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UserError("GGUF needs the package gguf", hint="pip install 'moetools[gguf]'") from error
    return gguf


def _check_family(config: Mapping[str, Any]) -> None:
    family = _family(config)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
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
    if window and window < length and config.get("use_sliding_window", True):
        raise UnsupportedModelError(f"GGUF: a sliding window of {window} tokens is not written for this family")


def _family(config: Mapping[str, Any]) -> GgufFamily:
    found = find_architecture(config).gguf
    if found is None:
        names = [name.replace("-", "_") for name in plugin_names(_FAMILIES)]
        written = [name for name in names if load_plugin(_FAMILIES, name, kind="model family").ARCHITECTURE.gguf]
        raise UnsupportedModelError(
            f"GGUF: model_type '{config.get('model_type')}' is not written", hint=f"written: {', '.join(written)}"
        )
    return found


def _check_tokenizer(source: Checkpoint) -> str:
    """llama.cpp's name of the pre-tokenizer."""
    file = source.path / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(
            f"GGUF: '{source.path}' holds no tokenizer.json", hint="save the tokenizer beside the model"
        )
    description = read_json_object(file)
    model, pre = description.get("model", {}), description.get("pre_tokenizer") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise UnsupportedModelError(
            "GGUF: only byte-level BPE tokenizers are written", hint="tokenizer.json says otherwise"
        )
    steps = pre.get("pretokenizers", [pre])
    regexes = [step.get("pattern", {}).get("Regex") for step in steps if step.get("type") == "Split"]
    if steps and steps[-1].get("type") == "ByteLevel":
        if not regexes and len(steps) == 1 and steps[0].get("use_regex", True):
            return "gpt-2"
        if len(regexes) == 1 and regexes[0] in _SPLITS:
            return _SPLITS[regexes[0]]
    raise UnsupportedModelError(f"GGUF: llama.cpp has no such pre-tokenizer: {json.dumps(pre)[:200]}")


def _integer_kind(bits: int) -> str:
    return "Q4_0" if bits <= 4 else "Q5_0" if bits == 5 else "Q8_0"


def _entries(source: Checkpoint, ternary: Ternary) -> list[_Entry]:
    gguf = _package()
    config = source.config
    family = _family(config)
    architecture = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[family.name]
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    experts: dict[tuple[int, str], dict[int, str]] = {}
    found = []
    for name in source.tensors:
        expert = _EXPERT.match(name)
        if expert and expert[3] in _ROLES:
            experts.setdefault((int(expert[1]), _ROLES[expert[3]]), {})[int(expert[2])] = name
            continue
        if name.endswith("rotary_emb.inv_freq"):
            continue
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise UnsupportedModelError(f"GGUF: no name for '{name}'")
        found.append(_Entry(name=new, parts=(name,), kind=_kind(source, name, ternary), heads=_heads(config, name)))
        if new == _EMBEDDINGS and "lm_head.weight" not in source.tensors and family.own_head:
            found.append(replace(found[-1], name="output.weight"))
    for (layer, role), parts in experts.items():
        here = tuple(parts[expert] for expert in sorted(parts))
        kinds = {_kind(source, name, ternary) for name in here}
        # One type for all experts: the widest holds the codes of the others as they are.
        kind = max(kinds, key=["TQ1_0", "TQ2_0", "Q4_0", "Q5_0", "Q8_0", "BF16", "F16", "F32"].index)
        if len(kinds) > 1 and kind not in ("Q5_0", "Q8_0"):
            raise UserError(f"GGUF: layer {layer} has {role} projections of types {', '.join(sorted(kinds))}")
        found.append(_Entry(name=f"blk.{layer}.ffn_{role}_exps.weight", parts=here, kind=kind))
    return found


def _kind(source: Checkpoint, name: str, ternary: Ternary) -> str:
    if isinstance(source, PackedCheckpoint) and name in source.packed:
        grid = source.packed[name].grid
        assert isinstance(grid, Integer)
        return ternary if grid.ternary else _integer_kind(grid.bits)
    info = source.tensors[name]
    router = re.search(r"\.(gate|shared_expert_gate)\.weight$", name)
    return info.dtype if len(info.shape) > 1 and not router and info.dtype in ("BF16", "F16") else "F32"


def _heads(config: Mapping[str, Any], name: str) -> int:
    """Heads whose rows are reordered, where llama.cpp rotates neighbouring pairs."""
    if not _family(config).neighbours:
        return 0
    if re.search(r"self_attn\.q_proj\.", name):
        return config["num_attention_heads"]
    if re.search(r"self_attn\.k_proj\.", name):
        return config.get("num_key_value_heads") or config["num_attention_heads"]
    return 0


def _shape(source: Checkpoint, entry: _Entry) -> tuple[int, ...]:
    shape = source.tensors[entry.parts[0]].shape
    if entry.name.endswith("ffn_gate_inp_shexp.weight"):
        return shape[-1:]
    return (len(entry.parts), *shape) if entry.name.endswith("_exps.weight") else shape


def _row_order(rows: int, heads: int) -> Tensor:
    if not heads:
        return torch.arange(rows)
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)


def _bytes(source: Checkpoint, entry: _Entry) -> np.ndarray:
    return np.concatenate([_matrix_bytes(source, name, entry) for name in entry.parts]).reshape(-1)


def _matrix_bytes(source: Checkpoint, name: str, entry: _Entry) -> np.ndarray:
    """The tensor's blocks, flat bytes."""
    gguf = _package()
    if not isinstance(source, PackedCheckpoint) or name not in source.packed:
        tensor = source.read([name])[name]
        order = _row_order(tensor.shape[0], entry.heads)
        kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        return tensor[order].to(kinds[entry.kind]).contiguous().view(torch.uint8).numpy().reshape(-1)
    quantized = source.quantized(name)
    if entry.kind.startswith("TQ"):
        value_OI = quantized.dequantize()[0]
        kind = gguf.GGMLQuantizationType[entry.kind]
        return gguf.quants.quantize(value_OI[_row_order(len(value_OI), entry.heads)].numpy(), kind).reshape(-1)
    return _PACKERS[entry.kind](*_blocks(name, quantized, entry.heads)).reshape(-1)


def _blocks(name: str, quantized: Quantized, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales fp16 [N, 1] and signed codes [N, 32] of all blocks."""
    codes_OI, scale_OG = quantized.codes_BOI[0], quantized.params.scale_BOG[0]
    order = _row_order(len(codes_OI), heads)
    repeats = (quantized.grid.group_size or codes_OI.shape[1]) // _BLOCK
    if bool((scale_OG.abs() > _HALF_LIMIT).any()):
        raise UserError(f"GGUF: a scale of '{name}' is too large for fp16")
    scale = scale_OG[order].repeat_interleave(repeats, dim=1).half().numpy().reshape(-1, 1)
    return scale, codes_OI[order].numpy().reshape(-1, _BLOCK)


def _q8_0(scale: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return np.concatenate([scale.view(np.uint8), codes.view(np.uint8)], axis=1)


def _q4_0(scale: np.ndarray, codes: np.ndarray) -> np.ndarray:
    raised = (codes + 8).astype(np.uint8)
    return np.concatenate([scale.view(np.uint8), raised[:, :16] | (raised[:, 16:] << 4)], axis=1)


def _q5_0(scale: np.ndarray, codes: np.ndarray) -> np.ndarray:
    raised = (codes + 16).astype(np.uint8)
    low, high = raised & 15, np.packbits(raised >> 4, axis=1, bitorder="little")
    return np.concatenate([scale.view(np.uint8), high, low[:, :16] | (low[:, 16:] << 4)], axis=1)


_PACKERS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q5_0": _q5_0}


def _write_structure(writer: Any, source: Checkpoint) -> None:
    config = source.config
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_name(source.path.resolve().name)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float((config.get("rope_parameters") or config).get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-5))
    writer.add_expert_count(config.get("num_local_experts") or config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    for key, add in _family(config).fields.items():
        if config.get(key):
            getattr(writer, add)(config[key])


def _write_tokenizer(writer: Any, source: Checkpoint) -> None:
    gguf = _package()
    pre = _check_tokenizer(source)
    description = read_json_object(source.path / "tokenizer.json")
    size, model = source.config["vocab_size"], description["model"]
    tokens = {index: token for token, index in model["vocab"].items()}
    types = dict.fromkeys(tokens, gguf.TokenType.NORMAL)
    for added in description.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    if tokens and max(tokens) >= size:
        raise CheckpointError(f"GGUF: tokenizer.json has token {max(tokens)}, the model {size} tokens")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([tokens.get(index, f"[PAD{index}]") for index in range(size)])
    writer.add_token_types([types.get(index, gguf.TokenType.UNUSED) for index in range(size)])
    merges = model["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for key, add in (
        ("bos_token_id", writer.add_bos_token_id),
        ("eos_token_id", writer.add_eos_token_id),
        ("pad_token_id", writer.add_pad_token_id),
    ):
        value = source.config.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int):
            add(value)
    writer.add_add_bos_token(False)


def read_gguf(file: Path) -> Iterator[tuple[str, str, np.ndarray]]:
    """Name, type and fp32 values of every tensor of a GGUF file, as the `gguf` package dequantizes them."""
    gguf = _package()
    for tensor in gguf.GGUFReader(str(file)).tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        yield tensor.name, tensor.tensor_type.name, np.asarray(values, dtype=np.float32).reshape(shape)


def _verify(source: Checkpoint, entries: list[_Entry], out: Path) -> None:
    """Compare every tensor of the file, dequantized by the gguf package, with what was meant."""
    wanted = {entry.name: entry for entry in entries}
    seen = set()
    for name, kind, values in read_gguf(out):
        entry = wanted.get(name)
        seen.add(name)
        meant = None if entry is None else _meant(source, entry)
        if entry is None or kind != entry.kind or meant is None or not np.array_equal(values, meant):
            raise VerificationError(f"{out}: tensor '{name}' ({kind}) is not what was meant")
    if seen != wanted.keys():
        raise VerificationError(f"{out}: tensor '{min(wanted.keys() - seen)}' is missing")


def _meant(source: Checkpoint, entry: _Entry) -> np.ndarray:
    """The tensor's values: codes times scales in fp32, scales in fp16."""
    values = []
    for name in entry.parts:
        if isinstance(source, PackedCheckpoint) and name in source.packed:
            quantized = source.quantized(name)
            scale_OG = quantized.params.scale_BOG[0].half().float()
            size = quantized.grid.group_size or quantized.codes_BOI.shape[2]
            value = quantized.codes_BOI[0].float() * scale_OG.repeat_interleave(size, dim=1)
        else:
            value = source.read([name])[name].float()
        values.append(value[_row_order(len(value), entry.heads)].numpy())
    return np.stack(values).reshape(_shape(source, entry))
