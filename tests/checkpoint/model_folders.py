"""Model folders for the tests, written with the safetensors library and never with the code under test."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moetools.checkpoint.writer import CheckpointWriter

DTYPES = (
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int16, torch.uint16,
    torch.int32, torch.uint32, torch.int64, torch.uint64, torch.bool, torch.complex64,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
)  # fmt: skip


def random_bytes(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """A tensor of random bits (bool: of random truth values)."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    flat = torch.randint(0, high, (count,), dtype=torch.uint8, generator=generator)
    return flat.view(dtype).reshape(shape)


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Equal in dtype, shape and every bit: random bits hold NaN, which equals nothing."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    views = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second)]
    return torch.equal(*views)


def write_model(folder: Path, shards: dict[str, dict[str, Tensor]], *, index: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "toy"}')
    for name, tensors in shards.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if index:
        weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
        write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_raw(file: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> None:
    """A safetensors file with any header, legal or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def tree_digest(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder`."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def toy_units(count: int = 3) -> dict[str, dict[str, Tensor]]:
    """Units of 1,280 bytes: two bf16 tensors and one f32."""
    return {
        f"layer.{i}": {
            f"layers.{i}.up": random_bytes((8, 16), torch.bfloat16, 3 * i),
            f"layers.{i}.down": random_bytes((16, 24), torch.bfloat16, 3 * i + 1),
            f"layers.{i}.bias": random_bytes((64,), torch.float32, 3 * i + 2),
        }
        for i in range(count)
    }


def write_all(out: Path, units: dict[str, dict[str, Tensor]], **options: Any) -> tuple[Path, list[str]]:
    """The whole journey a verb makes; returns the output and the units that this run wrote itself."""
    options = {"plan": {"method": "toy"}, "expected_bytes": 1280 * len(units)} | options
    source = options.pop("source", None)
    written = []
    with CheckpointWriter(out, **options) as writer:
        for unit, tensors in units.items():
            if unit not in writer.finished:
                writer.write_unit(unit, tensors, {"of": unit})
                written.append(unit)
            assert writer.payload(unit) == {"of": unit}
        if source is not None:
            writer.carry_sidecars(source)
        writer.write_json("config.json", {"model_type": "toy"})
        return writer.commit(), written
