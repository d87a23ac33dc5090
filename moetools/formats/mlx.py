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
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moetools.architectures.base import find_architecture
from moetools.architectures.config_check import EXPERTS_PER_LAYER
from moetools.architectures.mlx_family import MlxFamily
from moetools.checkpoint.folder import read_json_object
from moetools.checkpoint.reader import Checkpoint, open_checkpoint
from moetools.checkpoint.shards import shard_names, write_tensors
from moetools.errors import UnsupportedModelError, UserError, VerificationError
from moetools.formats.mlx_entries import (
    E8M0_BIAS,
    GROUPS,
    HEAD,
    Entry,
    codes_of,
    columns_of,
    group_of,
    make_entries,
    mlx_family,
    plain_values,
    quantized_parts,
    tensors_of,
)
from moetools.formats.reader import PackedCheckpoint
from moetools.grids._e2m1 import decode_e2m1
from moetools.grids.base import Grid
from moetools.grids.integer import Integer

FOLDER = "mlx"


def check_mlx(source: Checkpoint, grids: Mapping[str, Grid]) -> None:
    """Refuse what cannot be written or would run wrong in mlx-lm, before anything is computed.

    Args:
        grids: grid of every tensor that is (to be) packed.

    Raises:
        UnsupportedModelError: a family that mlx-lm does not run under the names written here.
        UserError: a grid that MLX has not, or layers with different numbers of experts.
    """
    _check_family(mlx_family(source.config), source)
    if source.config.get(EXPERTS_PER_LAYER):
        raise UserError("MLX needs equally many experts in every layer", hint="start from the original")
    for name, grid in grids.items():
        _check_grid(name, grid, columns_of(source, name))


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
    if not family.window and window and window < length and config.get("use_sliding_window", True):
        raise UnsupportedModelError(f"MLX: mlx-lm's {kind} has no sliding window; config.json has one of {window}")
    dense = [name for name in source.tensors if re.search(r"\.mlp\.(gate|up|down)_proj\.weight$", name)]
    if dense and not family.dense_layers:
        raise UnsupportedModelError(f"MLX: dense layer '{dense[0]}': mlx-lm's {kind} has experts in every layer")
    if family.problem and (why := family.problem(config)) is not None:
        raise UnsupportedModelError(f"MLX: mlx-lm's {kind} {why}")
    for name in source.tensors:
        if family.dropped and re.fullmatch(family.dropped, name) and bool(source.read([name])[name].any()):
            raise UnsupportedModelError(
                f"MLX: mlx-lm's {kind} leaves '{name}' out, which is not zero: it would choose other experts"
            )


def _check_grid(name: str, grid: Grid, columns: int) -> None:
    if grid.kind == "mxfp4":
        return
    if not isinstance(grid, Integer) or not grid.symmetric:
        raise UserError(
            f"MLX: no form for {grid.describe()} ('{name}')",
            hint="`scheme=w4a16`, another integer scheme, ternary or mxfp4, without `asymmetric`",
        )
    if not group_of(grid, columns):
        raise UserError(
            f"MLX: groups are 32, 64 or 128 columns; '{name}' has {columns} columns in groups of "
            f"{grid.group_size or columns}",
            hint="`group_size=32`" if columns % min(GROUPS) == 0 else "another model",
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
    layers = make_entries(source, grids)
    out.mkdir()
    _write_config(source, [entry for entries in layers for entry in entries], out)
    place: dict[str, str] = {}
    for file, entries in zip(shard_names(len(layers)), layers, strict=True):
        tensors: dict[str, Tensor] = {}
        for entry in entries:
            tensors |= tensors_of(source, entry)
        write_tensors(out / file, tensors)
        place |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": place}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for sidecar in source.sidecar_files():
        if sidecar.parent == Path() and sidecar.suffix in (".json", ".jinja", ".txt", ".model"):
            shutil.copyfile(source.path / sidecar, out / sidecar)
    _verify(source, layers, out)
    return {entry.module: _words(source, entry) for entries in layers for entry in entries}


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
    config.setdefault("tie_word_embeddings", HEAD not in source.tensors)
    counts = [config[key] for key in arch.count_keys if isinstance(config.get(key), int)]
    for key in arch.count_keys:
        config.setdefault(key, counts[0])
    if arch.mlx is not None and arch.mlx.defaults is not None:
        config = {**arch.mlx.defaults(config), **config}
    return config


def _write_config(source: Checkpoint, entries: Sequence[Entry], out: Path) -> None:
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
    codes = codes_of(words.reshape(-1, words.shape[-1]), kind["bits"]).reshape(*words.shape[:-1], -1)
    size = kind["group_size"]
    if kind["mode"] == "mxfp4":
        return decode_e2m1(codes) * torch.exp2(scales.float() - E8M0_BIAS).repeat_interleave(size, -1)
    offset = stored["biases"].double().repeat_interleave(size, -1)
    return (codes.double() * scales.double().repeat_interleave(size, -1) + offset).float()


def _verify(source: Checkpoint, layers: Sequence[Sequence[Entry]], out: Path) -> None:
    """Compare every tensor of the folder with what was meant."""
    wanted = {entry.module: entry for entries in layers for entry in entries}
    for module, values in read_mlx(out):
        entry = wanted.pop(module, None)
        if entry is None or not torch.equal(values, _meant(source, entry)):
            raise VerificationError(f"{out}: '{module}' is not what was meant")
    if wanted:
        raise VerificationError(f"{out}: '{min(wanted)}' is missing")


def _meant(source: Checkpoint, entry: Entry) -> Tensor:
    if entry.kind is None:
        return plain_values(source, entry).float()
    values = [quantized.dequantize()[0].float() for _, quantized in quantized_parts(source, entry)]
    return torch.stack(values) if len(values) > 1 or entry.stacked else values[0]


def _words(source: Checkpoint, entry: Entry) -> str:
    if entry.kind is None:
        return source.tensors[entry.parts[0]].dtype
    if entry.kind["mode"] == "mxfp4":
        return "mxfp4"
    return f"{entry.kind['bits']} bits in groups of {entry.kind['group_size']}"
