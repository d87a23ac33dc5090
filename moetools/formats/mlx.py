"""Writes a checkpoint as a folder for MLX (mlx-lm): weights, config.json and tokenizer.

Integers keep their codes: u = code + 2^(bits - 1), densely packed into 32-bit words, lowest bits first, with a scale s
and an offset b = -2^(bits - 1) s per group, both as precise as before; MLX computes s u + b. Bits are 2, 3, 4, 5, 6 or
8 (7 become 8), groups 32, 64 or 128 columns. MXFP4 keeps codes and exponents. What is not packed stays as it is. The
experts of a layer become one 3-D tensor per projection, of the widest codes and the smallest groups among them. Layers
for multi-token prediction are left out: mlx-lm has none.

Source: mlx 0.32 (`mx.dequantize`, modes affine and mxfp4) and mlx-lm 0.31 (`utils.load_model`, `models/*.py`: what
`sanitize` makes of a checkpoint).
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from moetools.architectures.base import find_architecture
from moetools.architectures.config_check import EXPERTS_PER_LAYER
from moetools.architectures.mlx_family import MlxFamily
from moetools.checkpoint.folder import read_json_object
from moetools.checkpoint.reader import Checkpoint, open_checkpoint
from moetools.checkpoint.shards import shard_names, write_tensors
from moetools.errors import UnsupportedModelError, UserError, VerificationError
from moetools.formats.reader import PackedCheckpoint
from moetools.grids._e2m1 import decode_e2m1
from moetools.grids.base import Grid
from moetools.grids.integer import Integer
from moetools.plugins import load_plugin, plugin_names

FOLDER = "mlx"
_FAMILIES = "moetools.architectures.families"
_BITS, _GROUPS = (2, 3, 4, 5, 6, 8), (128, 64, 32)
_MXFP4_GROUP, _E8M0_BIAS, _WORD = 32, 127, 32
_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(w[123]|(?:gate|up|down)_proj)\.weight$")
_ROLES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_REWRITTEN = re.compile(r"\.kv_b_proj\.weight$")
"""Written plain: mlx-lm takes it apart, and would round packed ones anew."""
_HEAD = "lm_head.weight"
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A matrix of the folder, or one per expert.

    Attributes:
        module: its name in mlx-lm, without `.weight`.
        parts: the tensors it is made of.
        kind: `quantization` of the module; None where it is written as it is.
    """

    module: str
    parts: tuple[str, ...]
    kind: dict[str, Any] | None
    stacked: bool


def check_mlx(source: Checkpoint, grids: Mapping[str, Grid]) -> None:
    """Refuse what cannot be written or would run wrong in mlx-lm, before anything is computed.

    Args:
        grids: grid of every tensor that is (to be) packed.

    Raises:
        UnsupportedModelError: a family that mlx-lm does not run under the names written here.
        UserError: a grid that MLX has not, or layers with different numbers of experts.
    """
    _check_family(_family(source.config), source)
    if source.config.get(EXPERTS_PER_LAYER):
        raise UserError("MLX needs equally many experts in every layer", hint="start from the original")
    for name, grid in grids.items():
        _check_grid(name, grid, source.tensors[name].shape[-1])


def _family(config: Mapping[str, Any]) -> MlxFamily:
    arch = find_architecture(config)
    if arch.mlx is None:
        names = [name.replace("-", "_") for name in plugin_names(_FAMILIES)]
        written = [name for name in names if load_plugin(_FAMILIES, name, kind="model family").ARCHITECTURE.mlx]
        raise UnsupportedModelError(
            f"MLX: model_type '{arch.model_type}' is not written", hint=f"written: {', '.join(written)}"
        )
    return arch.mlx


def _check_family(family: MlxFamily, source: Checkpoint) -> None:
    config = _config(source)
    kind = config["model_type"]
    for key in family.needs:
        if not config.get(key):
            raise UnsupportedModelError(f"MLX: mlx-lm's {kind} takes `{key}` for granted; config.json has none")
    for key in family.lacks:
        if config.get(key):
            raise UnsupportedModelError(f"MLX: mlx-lm's {kind} has no `{key}`; config.json says {config[key]}")
    if family.normalised not in (None, bool(config.get("norm_topk_prob"))):
        raise UnsupportedModelError(f"MLX: mlx-lm's {kind} has norm_topk_prob {family.normalised}")
    window, length = config.get("sliding_window"), config.get("max_position_embeddings", 0)
    if window and window < length and config.get("use_sliding_window", True):
        raise UnsupportedModelError(f"MLX: mlx-lm's {kind} has no sliding window; config.json has one of {window}")
    dense = [name for name in source.tensors if re.search(r"\.mlp\.(gate|up|down)_proj\.weight$", name)]
    if dense and not family.dense_layers:
        raise UnsupportedModelError(f"MLX: dense layer '{dense[0]}': mlx-lm's {kind} has experts in every layer")


def _check_grid(name: str, grid: Grid, columns: int) -> None:
    if grid.kind == "mxfp4":
        return
    if not isinstance(grid, Integer) or not grid.symmetric:
        raise UserError(
            f"MLX: no form for {grid.describe()} ('{name}')",
            hint="`scheme=w4a16`, another integer scheme, ternary or mxfp4, without `asymmetric`",
        )
    if not _group(grid, columns):
        raise UserError(
            f"MLX: groups are 32, 64 or 128 columns; '{name}' has {columns} columns in groups of "
            f"{grid.group_size or columns}",
            hint="`group_size=32`" if columns % min(_GROUPS) == 0 else "another model",
        )


def export_mlx(source: Checkpoint, out: Path) -> dict[str, str]:
    """Write the folder `out` and read it back; one layer's tensors are in memory at a time.

    Args:
        source: a plain or packed checkpoint (`moetools.formats.reader.open_model`).

    Returns:
        What every tensor of the folder is, by its module in mlx-lm: "4 bits in groups of 64", "BF16".

    Raises:
        UserError, UnsupportedModelError: see `check_mlx`.
        VerificationError: the folder does not hold what was meant.
    """
    packed = source.packed if isinstance(source, PackedCheckpoint) else {}
    grids = {name: one.grid for name, one in packed.items() if one.grid is not None}
    check_mlx(source, grids)
    layers = _entries(source, grids)
    out.mkdir()
    _write_config(source, [entry for entries in layers for entry in entries], out)
    place: dict[str, str] = {}
    for file, entries in zip(shard_names(len(layers)), layers, strict=True):
        tensors: dict[str, Tensor] = {}
        for entry in entries:
            tensors |= _tensors(source, entry)
        write_tensors(out / file, tensors)
        place |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": place}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for sidecar in source.sidecar_files():
        if sidecar.parent == Path() and sidecar.suffix in (".json", ".jinja", ".txt", ".model"):
            shutil.copyfile(source.path / sidecar, out / sidecar)
    _verify(source, layers, out)
    return {entry.module: _words(source, entry) for entries in layers for entry in entries}


def _entries(source: Checkpoint, grids: Mapping[str, Grid]) -> list[list[_Entry]]:
    """By layer; the last holds what lies outside all layers."""
    arch, config, family = find_architecture(source.config), source.config, _family(source.config)
    count = arch.text(config)["num_hidden_layers"]
    found: list[list[_Entry]] = [[] for _ in range(count + 1)]
    experts: dict[tuple[int, str], dict[int, str]] = {}
    for name in source.tensors:
        if arch.is_extra(name, config) or arch.predicts_more(name, config) or name.endswith("rotary_emb.inv_freq"):
            continue
        layer = _LAYER.match(name)
        place = int(layer[1]) if layer else count
        if expert := _EXPERT.match(name):
            module = f"{expert[1]}.{family.experts}.{_ROLES.get(expert[3], expert[3])}"
            experts.setdefault((place, module), {})[int(expert[2])] = name
        else:
            kind = _kind(source, [name], grids)
            found[place].append(_Entry(module=name.removesuffix(".weight"), parts=(name,), kind=kind, stacked=False))
            if family.own_head and _HEAD not in source.tensors and name.endswith("embed_tokens.weight"):
                found[place].append(_Entry(module="lm_head", parts=(name,), kind=kind, stacked=False))
    for (place, module), parts in experts.items():
        names = tuple(parts[number] for number in sorted(parts))
        found[place].append(_Entry(module=module, parts=names, kind=_kind(source, names, grids), stacked=True))
    return found


def _kind(source: Checkpoint, names: Sequence[str], grids: Mapping[str, Grid]) -> dict[str, Any] | None:
    """`quantization` of a module: the widest codes and the smallest groups of its parts; None for plain ones."""
    chosen = [grids.get(name) for name in names]
    if None in chosen or _REWRITTEN.search(names[0]):
        # A plain expert beside packed ones makes all of them plain.
        return None
    kinds = {grid.kind for grid in chosen if grid is not None}
    if kinds == {"mxfp4"}:
        return {"group_size": _MXFP4_GROUP, "bits": 4, "mode": "mxfp4"}
    if "mxfp4" in kinds:
        raise UserError(f"MLX: integers and mxfp4 among the experts of '{names[0]}'", hint="one scheme for all experts")
    columns = source.tensors[names[0]].shape[-1]
    integers = [grid for grid in chosen if isinstance(grid, Integer)]
    bits = max(min(one for one in _BITS if one >= grid.bits) for grid in integers)
    return {"group_size": min(_group(grid, columns) for grid in integers), "bits": bits, "mode": "affine"}


def _group(grid: Integer, columns: int) -> int:
    """Columns that share a scale in MLX; 0 where it has no such groups."""
    size = grid.group_size or columns
    return next((group for group in _GROUPS if size % group == 0 and columns % group == 0), 0)


def _tensors(source: Checkpoint, entry: _Entry) -> dict[str, Tensor]:
    parts = [_matrix(source, name, entry.kind) for name in entry.parts]
    stacked = {key: torch.stack([part[key] for part in parts]) for key in parts[0]} if entry.stacked else parts[0]
    # Vectors and tensors of other names keep theirs.
    plain = entry.parts[0] if not entry.stacked and not entry.parts[0].endswith(".weight") else ""
    return {plain or f"{entry.module}.{key}": tensor for key, tensor in stacked.items()}


def _matrix(source: Checkpoint, name: str, kind: Mapping[str, Any] | None) -> dict[str, Tensor]:
    if kind is None:
        return {"weight": source.read([name])[name]}
    assert isinstance(source, PackedCheckpoint)
    quantized = source.quantized(name)
    codes_OI, scale_OG = quantized.codes_BOI[0], quantized.params.scale_BOG[0]
    if kind["mode"] == "mxfp4":
        exponent_OG = torch.frexp(scale_OG).exponent - 1 + _E8M0_BIAS
        return {"weight": _words_of(codes_OI, 4), "scales": exponent_OG.to(torch.uint8)}
    half = 1 << (kind["bits"] - 1)
    repeats = (quantized.grid.group_size or codes_OI.shape[1]) // kind["group_size"]
    scale_OG = scale_OG.repeat_interleave(repeats, dim=1).to(_scale_dtype(source, name))
    raised_OI = (codes_OI.short() + half).to(torch.uint8)
    return {"weight": _words_of(raised_OI, kind["bits"]), "scales": scale_OG, "biases": -half * scale_OG}


def _scale_dtype(source: PackedCheckpoint, name: str) -> torch.dtype:
    grid = source.packed[name].grid
    assert isinstance(grid, Integer)
    return getattr(torch, grid.scale_dtype)


def _words_of(codes_OI: UInt8[Tensor, "O I"], bits: int) -> Tensor:
    """Codes packed densely into 32-bit words, lowest bits first: uint32 [O, I * bits / 32]."""
    rows, columns = codes_OI.shape
    spread = np.unpackbits(codes_OI.numpy()[..., None], axis=-1, count=bits, bitorder="little")
    packed = np.packbits(spread.reshape(rows, columns * bits), axis=1, bitorder="little")
    return torch.from_numpy(packed).view(torch.uint32)


def _codes_of(words_OW: Tensor, bits: int) -> UInt8[Tensor, "O I"]:
    """What `_words_of` packed."""
    rows = words_OW.shape[0]
    spread = np.unpackbits(words_OW.contiguous().view(torch.uint8).numpy(), axis=1, bitorder="little")
    codes = np.packbits(spread.reshape(rows, -1, bits), axis=-1, bitorder="little")
    return torch.from_numpy(codes[..., 0])


def _config(source: Checkpoint) -> dict[str, Any]:
    """config.json with the older spellings that mlx-lm reads beside those of transformers 5."""
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    rope = dict(config.get("rope_parameters") or {})
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            config.setdefault(key, rope.pop(key))
    scaled = rope.get("rope_type", "default") != "default"
    config.setdefault("rope_scaling", {**rope, "type": rope["rope_type"]} if scaled else None)
    arch = find_architecture(source.config)
    # A default of mlx-lm's need not be that of transformers.
    config.setdefault("tie_word_embeddings", _HEAD not in source.tensors)
    counts = [config[key] for key in arch.count_keys if isinstance(config.get(key), int)]
    for key in arch.count_keys:
        config.setdefault(key, counts[0])
    return config


def _write_config(source: Checkpoint, entries: Sequence[_Entry], out: Path) -> None:
    config = _config(source)
    kinds = {entry.module: entry.kind for entry in entries if entry.kind is not None}
    if kinds:
        most = max(kinds.values(), key=list(kinds.values()).count)
        config["quantization"] = {**most, **{module: kind for module, kind in kinds.items() if kind != most}}
    (out / "config.json").write_text(json.dumps(config, indent=2))


def read_mlx(folder: Path) -> Iterator[tuple[str, Float[Tensor, "..."]]]:
    """Module (or tensor) and values of everything in the folder, as MLX dequantizes it, in fp32."""
    quantization = read_json_object(folder / "config.json").get("quantization", {})
    checkpoint = open_checkpoint(folder)
    for name in checkpoint.tensors:
        module = name.removesuffix(".weight")
        if f"{module}.scales" not in checkpoint.tensors:
            if not name.endswith((".scales", ".biases")):
                yield module, checkpoint.read([name])[name].float()
            continue
        kind = quantization.get(module, quantization)
        names = [one for one in (name, f"{module}.scales", f"{module}.biases") if one in checkpoint.tensors]
        stored = {one.rpartition(".")[2]: tensor for one, tensor in checkpoint.read(names).items()}
        yield module, _values(stored, kind)


def _values(stored: Mapping[str, Tensor], kind: Mapping[str, Any]) -> Tensor:
    words, scales = stored["weight"], stored["scales"]
    codes = _codes_of(words.reshape(-1, words.shape[-1]), kind["bits"]).reshape(*words.shape[:-1], -1)
    size = kind["group_size"]
    if kind["mode"] == "mxfp4":
        return decode_e2m1(codes) * torch.exp2(scales.float() - _E8M0_BIAS).repeat_interleave(size, -1)
    offset = stored["biases"].double().repeat_interleave(size, -1)
    return (codes.double() * scales.double().repeat_interleave(size, -1) + offset).float()


def _verify(source: Checkpoint, layers: Sequence[Sequence[_Entry]], out: Path) -> None:
    """Compare every tensor of the folder with what was meant."""
    wanted = {entry.module: entry for entries in layers for entry in entries}
    for module, values in read_mlx(out):
        entry = wanted.pop(module, None)
        if entry is None or not torch.equal(values, _meant(source, entry)):
            raise VerificationError(f"{out}: '{module}' is not what was meant")
    if wanted:
        raise VerificationError(f"{out}: '{min(wanted)}' is missing")


def _meant(source: Checkpoint, entry: _Entry) -> Tensor:
    values = []
    for name in entry.parts:
        if entry.kind is None:
            values.append(source.read([name])[name].float())
        else:
            assert isinstance(source, PackedCheckpoint)
            values.append(source.quantized(name).dequantize()[0].float())
    return torch.stack(values) if entry.stacked else values[0]


def _words(source: Checkpoint, entry: _Entry) -> str:
    if entry.kind is None:
        return source.tensors[entry.parts[0]].dtype
    if entry.kind["mode"] == "mxfp4":
        return "mxfp4"
    return f"{entry.kind['bits']} bits in groups of {entry.kind['group_size']}"
